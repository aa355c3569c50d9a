"""qemu-system-x86_64 with TCG as a yardstick: a firmware image of a few bytes that runs one loop.

There is no SeaBIOS: the 64 KiB image is the machine's only firmware. Its reset vector jumps to 16-bit code that enters
64-bit mode with tables that stand in the image (they need no writing: accessed and dirty bits are set), one to one for
2 MiB. Then the guest writes 'a' to the debug console, runs the loop, writes 'b' and leaves through isa-debug-exit. Both
bytes reach us through a pipe, so the time between them is the loop's alone, without the start of a process and of a
machine.

The data of a loop goes at 0x10000 and may have 64 KiB.
"""

from __future__ import annotations

import os
import select
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from benchlib.bare import GuestFailed
from benchlib.entry import Skipped

PROGRAM = "qemu-system-x86_64"
DATA = 0x10000
TIMEOUT = 30.0  # seconds; a loop takes a fraction of one
_BASE, _SIZE = 0xF0000, 0x10000
_CODE, _GDT_POINTER, _GDT, _PML4, _PDPT, _DIRECTORY = 0x100, 0x200, 0x208, 0x1000, 0x2000, 0x3000

# cli; lgdt cs:[0x200]; mov eax, 0x20; mov cr4, eax; mov eax, 0xf1000; mov cr3, eax;
# mov ecx, 0xc0000080; mov eax, 0x100; xor edx, edx; wrmsr; mov eax, 0x80000001; mov cr0, eax; ljmp 8:0xf0100
_START = bytes.fromhex(
    "fa 2e660f01160002 66b820000000 0f22e0 66b800100f00 0f22d8 66b9800000c0 66b800010000 6631d2 0f30 66b801000080 0f22c0 66ea00010f000800"
)
# mov dx, 0xe9; mov al, 'a'; out dx, al; xor eax, eax; xor ebx, ebx
_BEFORE = bytes.fromhex("66bae900 b061 ee 31c0 31db")
# mov dx, 0xe9; mov al, 'b'; out dx, al; mov edx, 0xf4; out dx, al; hlt
_AFTER = bytes.fromhex("66bae900 b062 ee baf4000000 ee f4")
_RESET = bytes.fromhex("ea000000f0")  # ljmp 0xf000:0


def need_qemu() -> None:
    """Raise `Skipped` where the program is not installed."""
    if shutil.which(PROGRAM) is None:
        raise Skipped(f"needs {PROGRAM}: none on PATH; get it: apt install qemu-system-x86")


def image(loop: bytes) -> bytes:
    """The firmware that runs `loop` once."""
    rom = bytearray(_SIZE)

    def put(at: int, data: bytes) -> None:
        rom[at : at + len(data)] = data

    put(0, _START)
    put(_CODE, _BEFORE + loop + _AFTER)
    put(_GDT_POINTER, struct.pack("<HI", 15, _BASE + _GDT))
    put(_GDT, struct.pack("<2Q", 0, 0x00AF9B000000FFFF))
    put(_PML4, struct.pack("<Q", _BASE + _PDPT | 0x23))
    put(_PDPT, struct.pack("<Q", _BASE + _DIRECTORY | 0x23))
    put(_DIRECTORY, struct.pack("<Q", 0xE3))
    put(0xFFF0, _RESET)
    return bytes(rom)


def _expect(pipe: int, letter: bytes) -> float:
    """The time when `letter` came."""
    if not select.select([pipe], [], [], TIMEOUT)[0]:
        raise GuestFailed(f"{PROGRAM} did not reach {letter!r} within {TIMEOUT:g} s")
    found = os.read(pipe, 1)
    now = time.perf_counter()
    if found != letter:
        raise GuestFailed(f"{PROGRAM} wrote {found!r} instead of {letter!r}")
    return now


class Tcg:
    """Measures one loop; a context manager that keeps the image in a temporary file."""

    def __init__(self, loop: bytes) -> None:
        need_qemu()
        self._folder = tempfile.TemporaryDirectory()
        self._rom = Path(self._folder.name) / "rom.bin"
        self._rom.write_bytes(image(loop))

    def __enter__(self) -> Tcg:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def seconds(self) -> float:
        """Start the machine and run the loop; how long the loop took. Raises GuestFailed."""
        command = [PROGRAM, "-accel", "tcg", "-machine", "pc", "-m", "16", "-smp", "1", "-nodefaults", "-no-reboot", "-display", "none"]
        command += ["-bios", str(self._rom), "-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert machine.stdout is not None
            began = _expect(machine.stdout.fileno(), b"a")
            ended = _expect(machine.stdout.fileno(), b"b")
        except GuestFailed as failure:
            machine.kill()
            said = machine.communicate()[1].decode(errors="replace").strip()
            raise GuestFailed(f"{failure}{': ' + said if said else ''}") from None
        finally:
            machine.kill()
            machine.communicate()
        return ended - began
