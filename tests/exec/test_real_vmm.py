"""A VMM that nobody here wrote, under `sevmm exec`: QEMU's firmware finds a multiboot image and starts it."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from tests.exec.launching import Under

_MAGIC, _ADDRESSES = 0x1BADB002, 1 << 16
_AT = 0x100000
_ENTRY = _AT + 32
_TEXT = b"the guest speaks\n"
_CODE = bytes.fromhex("be 00000000 b9 00000000 ba f8030000 f3 6e ba f4000000 b0 20 ee f4 eb fd")
"""mov esi, TEXT; mov ecx, LENGTH; mov edx, 0x3f8; rep outsb; mov edx, 0xf4; mov al, 0x20; out dx, al; 0: hlt; jmp 0b"""
_STATUS = 0x20 << 1 | 1  # what isa-debug-exit makes of it
_MACHINES = {
    "pc": ["-M", "pc,kernel-irqchip=on", "-vga", "none"],
    "microvm": ["-M", "microvm,rtc=on,kernel-irqchip=on", "-no-user-config"],
    "microvm-split": ["-M", "microvm", "-no-user-config"],
    "q35-split": ["-M", "q35,kernel-irqchip=split", "-vga", "none"],
}


def multiboot() -> bytes:
    """An image that says a line on COM1 and ends QEMU."""
    code = bytearray(_CODE)
    struct.pack_into("<I", code, 1, _ENTRY + len(code))
    struct.pack_into("<I", code, 6, len(_TEXT))
    end = _ENTRY + len(code) + len(_TEXT)
    header = struct.pack("<8I", _MAGIC, _ADDRESSES, -(_MAGIC + _ADDRESSES) & 0xFFFFFFFF, _AT, _AT, end, end, _ENTRY)
    return header + code + _TEXT


@pytest.mark.parametrize("machine", _MACHINES)
def test_qemu_starts_a_guest(machine: str, under: Under, shelf: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("needs QEMU; get it: apt install qemu-system-x86")
    image = shelf / "multiboot.bin"
    image.write_bytes(multiboot())
    common = ["-accel", "kvm", "-cpu", "host", "-m", "64", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    done = under.run(qemu, *common, *_MACHINES[machine], "-device", "isa-debug-exit,iobase=0xf4", "-kernel", str(image), limit=120)
    assert _TEXT.decode().strip() in done.stdout and done.returncode == _STATUS, (done.returncode, done.stdout, done.stderr)
