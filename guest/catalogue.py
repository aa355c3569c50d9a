"""The bundled guests, one row each: name, the property it proves, and what it needs from a VMM.

The first of `types` is what a guest runs on where nobody names a type. On SEV-ES every exit of these programs is a #VC
exception, which the guest library turns into a question to the host (guest/lib/vc.c): the programs are the same.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

PROGRAMS = pathlib.Path(__file__).parent / "programs"


@dataclass(frozen=True, slots=True)
class Guest:
    """One bundled guest.

    `needs` holds "hypercall" where MAP_GPA_RANGE must exit to the VMM. `lazy_private` asks for a test area that has the
    PRIVATE attribute but no guest_memfd behind it, so that the first touch of each page is a memory fault exit.
    `protocol` says which contract the image follows: "sevmm" (docs/seams.md, section 4) or "multiboot", which has a linker script
    and start-up code of its own beside its source.
    `irqchip` asks for interrupt controllers in the kernel, with which vCPUs other than 0 wait for a startup IPI.
    `takes_secret` marks guests that look at the secret page; without a secret they fail.
    `sample` marks guests that do not pass by design (they never end, or die) and exist for tests of the VMM.

        >>> find("private-memory").types
        ('sev', 'sev-es', 'sw-protected')
    """

    name: str
    proves: str
    types: tuple[str, ...] = ("plain", "sw-protected", "sev", "sev-es")
    needs: frozenset[str] = frozenset()
    lazy_private: bool = False
    takes_secret: bool = False
    irqchip: bool = False
    sample: bool = False
    protocol: str = "sevmm"

    @property
    def source(self) -> pathlib.Path:
        """The C file of the program, among the package's data."""
        return PROGRAMS / (self.name.replace("-", "_") + ".c")


GUESTS: tuple[Guest, ...] = (
    Guest("hello", "a guest runs on every vCPU, its console text arrives, and its exit code passes through"),
    Guest("exits", "each kind of exit carries the right data to the VMM and the VMM's answer back to the guest"),
    Guest(
        "convert",
        "explicit conversions in both directions, of 4 KiB up to 2 MiB, leave the contents that the VM type promises",
        types=("sw-protected", "sev", "sev-es", "plain"),
        needs=frozenset({"hypercall"}),
    ),
    Guest(
        "fault",
        "the first touch of a private page without backing becomes an implicit conversion, and no access is lost",
        types=("sw-protected",),
        lazy_private=True,
    ),
    Guest(
        "private-memory",
        "what the guest writes into private memory stays as written and is not seen through a shared mapping",
        types=("sev", "sev-es", "sw-protected"),
        needs=frozenset({"hypercall"}),
    ),
    Guest(
        "multiboot",
        "a 32-bit Multiboot image finds what its contract promises (memory map, command line, CPUs) and reaches 64-bit mode by itself",
        types=("plain",),
        protocol="multiboot",
    ),
    Guest(
        "secret",
        "a secret that its owner sealed after the measurement arrives in private memory, and the guest proves it without showing it",
        types=("sev", "sev-es"),
        takes_secret=True,
    ),
    Guest(
        "ap-start",
        "the first startup IPI runs a vCPU as it was measured, and a later one ends its reset hold (with --vcpus 2 or more)",
        types=("sev-es",),
        irqchip=True,
    ),
    Guest("spin", "a guest that never ends can be stopped", sample=True),
    Guest("crash", "an exception nobody expects ends the guest with one line and exit code 0x7f", sample=True),
)


def find(name: str) -> Guest:
    """The row called `name`; KeyError with a sentence that names the ones there are."""
    for guest in GUESTS:
        if guest.name == name:
            return guest
    raise KeyError(f"no bundled guest {name!r}; there are: {', '.join(guest.name for guest in GUESTS)}")
