"""The test device: its memory, its word, and interrupt lines that a guest raises and takes."""

import struct
from pathlib import Path
from typing import Any

from tests.vmm import ports
from tests.vmm.pcguests import elf, write
from vmm.run import GuestRequest, run_guest
from vmm.testdev import MEMORY, MEMORY_SIZE, TestMemory, TestPorts


def test_memory_keeps_what_is_written_and_knows_its_ends() -> None:
    memory = TestMemory()
    assert memory.read(MEMORY + 8, 8) == bytes(8)
    memory.write(MEMORY + MEMORY_SIZE - 8, b"12345678")
    assert memory.read(MEMORY + MEMORY_SIZE - 4, 4) == b"5678"
    assert memory.holds(MEMORY, 1) and memory.holds(MEMORY + MEMORY_SIZE - 8, 8)
    assert not memory.holds(MEMORY - 1, 1) and not memory.holds(MEMORY + MEMORY_SIZE - 4, 8)


def test_the_word_takes_every_width() -> None:
    device = TestPorts()
    ports.write(device.word, 0xE0, 0x11223344, 4)
    assert ports.read(device.word, 0xE0, 4) == b"\x44\x33\x22\x11"
    ports.write(device.word, 0xE1, 0xAABB, 2)
    assert ports.read(device.word, 0xE0, 4) == b"\x44\xbb\xaa\x11"
    assert ports.read(device.word, 0xE3, 2) == b"\x11\xff"
    ports.write(device.word, 0xE3, 0x5566, 2)
    assert ports.read(device.word, 0xE0, 4) == b"\x44\xbb\xaa\x66"
    assert ports.read(device.word, 0xE0, 1, 3) == b"\x44\x44\x44"
    device.word(0xE0, 2, 2, memoryview(bytearray(b"abcd")), True)
    assert ports.read(device.word, 0xE0, 2) == b"cd"


def test_lines_are_raised_and_lowered() -> None:
    seen: list[tuple[int, int]] = []
    device = TestPorts(lambda gsi, level: seen.append((gsi, level)))
    ports.write(device.line, 0x2000, 1)
    ports.write(device.line, 0x2017, 0)
    ports.write(device.line, 0x2005, 0x100, 2)
    assert seen == [(0, 1), (23, 0), (5, 0)]
    assert ports.read(device.line, 0x2000) == b"\0"


def lines() -> bytes:
    """A guest that routes GSI 5 to vector 0x40 in the I/O APIC, raises it by port 0x2005 and exits with 3 from the handler.

    In protected mode: an IDT at 0x280000 with one gate, the handler behind the code.
    """
    setup = bytes.fromhex(
        "bc00003000"  # mov esp, 0x300000
        "bff0ffff0f"  # mov edi, the handler's address, which is put here below
    )
    body = b"".join(
        [
            b"\x89\xf8\x25\xff\xff\x00\x00\x0d\x00\x00\x10\x00",  # mov eax, edi; and eax, 0xffff; or eax, 0x100000 (selector 0x10)
            b"\xa3" + struct.pack("<I", 0x280000 + 8 * 0x40),
            b"\x89\xf8\x25\x00\x00\xff\xff\x0d\x00\x8e\x00\x00",  # the gate's upper half: present, 32-bit interrupt gate
            b"\xa3" + struct.pack("<I", 0x280004 + 8 * 0x40),
            b"\x66\xc7\x05" + struct.pack("<IH", 0x281000, 0x7FF) + b"\xc7\x05" + struct.pack("<II", 0x281002, 0x280000),
            b"\x0f\x01\x1d" + struct.pack("<I", 0x281000),  # lidt
            b"\xb0\xff\xe6\x21\xe6\xa1",  # the two PICs masked: they are wired to the same lines
            b"\xc7\x05" + struct.pack("<II", 0xFEE000F0, 0x1FF),  # APIC on
            b"\xc7\x05" + struct.pack("<II", 0xFEC00000, 0x1B) + b"\xc7\x05" + struct.pack("<II", 0xFEC00010, 0),  # to APIC 0
            b"\xc7\x05" + struct.pack("<II", 0xFEC00000, 0x1A) + b"\xc7\x05" + struct.pack("<II", 0xFEC00010, 0x40),  # edge, vector 0x40
            b"\xfb\x66\xba\x05\x20\xb0\x01\xee",  # sti; mov dx, 0x2005; mov al, 1; out dx, al
            b"\xf4\xeb\xfd",  # 1: hlt; jmp 1b
        ]
    )
    handler = b"\xb8\x03\x00\x00\x00\xe7\xf4\xf4"
    code = setup + body
    at = 0x200000 + 12 + len(code)
    return code.replace(b"\xbf\xf0\xff\xff\x0f", b"\xbf" + struct.pack("<I", at), 1) + handler


def test_a_guest_takes_the_interrupt_it_raised(any_host: Any, tmp_path: Path) -> None:
    report = run_guest(GuestRequest(write(tmp_path, elf(lines(), memory=0x100000)), host=any_host, timeout=20))
    assert (report.exit_code, report.message) == (3, "")
