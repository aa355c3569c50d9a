"""Test support: small programs for the tiny SEV-ES host, and what their runs ended with."""

from __future__ import annotations

from pathlib import Path

from boot_image import symbol
from elftools.elf.elffile import ELFFile
from tiny_es import EsEngine

from guest.build import build_text

CPUID = """
	uint32_t a = 1, b = 2, c = 0, d = 4;
	asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));"""


def terminated(engine: EsEngine) -> tuple[int, int]:
    """Reason set and code of the termination that ended the run."""
    assert engine.result.end == "terminate", engine.result.console
    assert engine.terminated is not None and engine.terminated & 0xFFF == 0x100 and engine.terminated >> 24 == 0
    return engine.terminated >> 12 & 15, engine.terminated >> 16


def text(body: str, head: str = "", library: str = "ghcb.h") -> Path:
    """A program whose guest_main is `body`."""
    return build_text(
        f'#include "{library}"\n{head}\nunsigned guest_main(const struct boot_info *boot, unsigned vcpu)\n'
        f"{{\n\t(void)boot, (void)vcpu;\n{body}\n\treturn EXIT_PASS;\n}}\n"
    )


def passed(engine: EsEngine) -> None:
    assert (engine.result.end, engine.result.code) == ("exit", 0), (engine.result.console, engine.terminated)


def at_symbol(elf: Path, name: str) -> int:
    """The address of a global symbol."""
    with elf.open("rb") as file:
        return int(symbol(ELFFile(file), name)["st_value"])
