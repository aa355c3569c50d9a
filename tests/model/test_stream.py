"""LAUNCH_UPDATE_DATA of any size and place: the digest, the ciphertext, and what is left when something is missing."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os

import pytest

from kvmapi.abi import psp
from kvmapi.model.caller import Errno, OwnMemory
from kvmapi.model.sev import stream
from kvmapi.model.sev.firmware import Firmware
from kvmapi.model.sev.guest import GuestContext
from kvmapi.model.sev.status import FirmwareError

MIB = 1 << 20


def guest() -> GuestContext:
    firmware = Firmware(15, 5)
    context = firmware.launch_start(0, b"", b"")
    firmware.activate(context, 5)
    return context


def digest_of(context: GuestContext) -> bytes:
    return context._digest.digest()


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 4096), (0, 16), (4080, 32), (16, 3 * 4096), (48, 3 * MIB), (0, 5 * MIB), (MIB - 4096, 5 * MIB + 4096 + 16), (32, 6 * MIB - 64)],
)
def test_any_place_and_size(start: int, size: int) -> None:
    memory = mmap.mmap(-1, 8 * MIB)
    plain = os.urandom(8 * MIB)
    memory[:] = plain
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    context = guest()
    stream.update_data(context, OwnMemory(), base + start, size)
    assert digest_of(context) == hashlib.sha256(plain[start : start + size]).digest()
    assert memory[:start] == plain[:start] and memory[start + size :] == plain[start + size :]
    part = memory[start : start + size]
    assert context.cipher.decrypt(base + start, part) == plain[start : start + size] != part


def test_nothing_changes_when_the_firmware_refuses() -> None:
    memory = mmap.mmap(-1, MIB)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    context = guest()
    for address, size, code in ((base + 8, 4096, psp.SEV_RET_INVALID_ADDRESS), (base, 4095, psp.SEV_RET_INVALID_LEN)):
        with pytest.raises(FirmwareError) as failure:
            stream.update_data(context, OwnMemory(), address, size)
        assert failure.value.status == code
    context.measure()
    with pytest.raises(FirmwareError):
        stream.update_data(context, OwnMemory(), base, 4096)
    assert memory[:] == bytes(MIB)


@pytest.mark.parametrize("size", [2 * MIB, 6 * MIB])
def test_a_hole_in_the_range(size: int) -> None:
    """EFAULT, the pages before it are done, and no thread is left."""
    memory = mmap.mmap(-1, size)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + size - MIB + 4096), ctypes.c_size_t(4096), 0)
    context = guest()
    with pytest.raises(Errno):
        stream.update_data(context, OwnMemory(), base, size)
    assert context.cipher.decrypt(base, memory[:4096]) == bytes(4096)
    assert memory[size - 4096 :] == bytes(4096)
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + size - MIB + 4096), ctypes.c_size_t(4096), 3)
