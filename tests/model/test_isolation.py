"""Private plaintext and keys cannot be read from this process while the guest is stopped.

The scan reads every readable mapping of /proc/self/maps through /proc/self/mem, all of it: nothing is excluded. The
marker is never in memory as such: it is kept as its complement, and the guest computes it. The arena of plaintext is
PROT_NONE while no vCPU runs, and memfd_secret where the kernel has it; without memfd_secret /proc/self/mem could read
through PROT_NONE (access_process_vm forces), so the scan there is limited to readable mappings, and `test_the_arena`
says what is promised.
"""

from __future__ import annotations

import copy
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from kvmapi.exits import Hlt
from kvmapi.model.mem.arena import Arena
from kvmapi.session import OwnerSession
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import ALIAS, CODE, DATA, MIB, code
from tests.model.sev_guest import SevGuest

pytestmark = pytest.mark.model
# Writes the 16-byte marker ~(rax), ~(rdx) to [rbx] and leaves no register holding it.
MARK = code(
    "48f7d048 f7d24889 03488953 0831c031 d2f4", "not rax; not rdx; mov [rbx], rax; mov [rbx + 8], rdx; xor eax, eax; xor edx, edx; hlt"
)


def scan(words: tuple[int, int]) -> list[str]:
    """Mappings that hold the two words next to each other, given as complements."""
    needle = bytearray(struct.pack("<2Q", *words))
    found = []
    with open("/proc/self/maps", encoding="ascii") as maps:
        rows = [line.split(None, 5) for line in maps]
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    chunk = bytearray(4 * MIB)
    view = memoryview(chunk)
    try:
        for row in rows:
            if "r" not in row[1] or "[vvar" in row[-1]:  # vvar is the kernel's clock page: it cannot be read this way
                continue
            first, last = (int(text, 16) for text in row[0].split("-"))
            for at in range(first, last, len(chunk)):
                try:
                    count = os.preadv(fd, [view[: min(len(chunk), last - at)]], at)
                except OSError:
                    continue
                if _hit(chunk, count, needle, at):
                    found.append(f"{at:#x} {row[-1].strip()}")
    finally:
        os.close(fd)
    return found


def _hit(chunk: bytearray, count: int, needle: bytearray, base: int) -> bool:
    """Is the complement of `needle` in chunk[:count]? Compared by halves, so that the marker is never built whole."""
    head = bytes(~byte & 0xFF for byte in needle[:8])
    at = chunk.find(head, 0, count)
    while at >= 0:
        if all(chunk[at + 8 + n] == ~needle[8 + n] & 0xFF for n in range(8) if at + 8 + n < count):
            return True
        at = chunk.find(head, at + 1, count)
    return False


def mark(guest: SevGuest, va: int) -> tuple[int, int]:
    """Let the guest write a fresh marker at `va`; its complement."""
    words = (int.from_bytes(os.urandom(8), "little"), int.from_bytes(os.urandom(8), "little"))
    assert guest.again(rbx=va, rax=words[0], rdx=words[1]) == Hlt()
    return words


@pytest.mark.parametrize("place", [DATA, CODE + 0x800])
def test_a_private_marker_is_nowhere(model_host: Any, place: int) -> None:
    """Also on a page that holds code, which the CPU model must look at; and after the page was decrypted again."""
    with SevGuest(model_host, MARK) as guest:
        words = mark(guest, place)
        guest.vm.set_user_memory_region(9, 64 * MIB, 4096, guest.hva)  # a slot that goes away evicts every page
        guest.vm.set_user_memory_region(9, 64 * MIB, 0, guest.hva)
        mark(guest, place + 0x20)
        assert scan(words) == []


def test_the_control_finds_a_shared_marker(model_host: Any) -> None:
    with SevGuest(model_host, MARK) as guest:
        words = mark(guest, ALIAS + DATA)
        assert scan(words) != []


def test_the_arena() -> None:
    """Closed: no mapping of it is readable. Secret: not even the kernel's own copy paths read it when it is open."""
    arena = Arena()
    try:
        arena.open_door()
        arena.view[:16] = b"plaintext inside"
        arena.close_door()
        row = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{arena.address:x}-"))
        assert row.split()[1].startswith("---")
        if not arena.secret:
            pytest.skip("this kernel has no memfd_secret (boot with secretmem.enable=1): PROT_NONE is all that protects the arena")
        arena.open_door()
        fd = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            with pytest.raises(OSError):
                os.pread(fd, 16, arena.address)
        finally:
            os.close(fd)
    finally:
        arena.destroy()


def test_keys_do_not_show(model_host: Any) -> None:
    """repr and str, pickle and copy of what uses keys (test_keys_stay_inside searches for the keys themselves)."""
    platform = SevPlatform(model_host)
    owner = OwnerSession.create(platform.pdh_cert_export()[0], 0)
    platform.close()
    with SevGuest(model_host, dh_cert=owner.dh_cert, session=owner.session) as guest:
        firmware = model_host.platform.firmware
        context = next(iter(firmware._guests.values()))
        transport = context._GuestContext__transport
        for thing in (context, context.cipher, transport, firmware, owner, model_host, guest.launch):
            text = repr(thing) + str(thing)
            assert not any(key.hex() in text or repr(key) in text for key in (owner.tek, owner.tik))
        for thing in (context.cipher, context, transport):
            with pytest.raises(TypeError):
                pickle.dumps(thing)
            with pytest.raises(TypeError):
                copy.deepcopy(thing)
            assert not [name for name in dir(thing) if isinstance(getattr(thing, name), bytes | bytearray) and name != "_measure"]
        assert guest.get(CODE, 4) != MARK[:4]
