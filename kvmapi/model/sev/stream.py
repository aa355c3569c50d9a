"""LAUNCH_UPDATE_DATA of any size: measured and encrypted where it stands, in pieces that fit the cache.

The caller's memory is copied in and out with system calls that fail on what is not there (EFAULT), in buffers that are
made once. Plaintext passes through these: LAUNCH_UPDATE_DATA is what makes memory secret, the caller had it in the clear
until now.

A large range is measured by a second thread while this one encrypts: SHA-256 takes longer than all the rest. It gets its
turn because the system call that stores the piece before follows at once, and lets other threads run.

All checks come before the first byte changes; a range that loses its mapping in the middle keeps what was done, as
KVM's command does when the firmware fails in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from kvmapi.model.mem.cipher import SLACK, UNIT

if TYPE_CHECKING:
    from kvmapi.model.sev.guest import GuestContext

_CHUNK = 256 * 1024  # a multiple of UNIT; two of them stay in the cache
_LARGE_CHUNK = 2 << 20
_LARGE = 4 * _LARGE_CHUNK  # from here on a second thread saves more than it costs


class Copies(Protocol):
    """Memory that can be copied from and to; what `Memory` has."""

    def write(self, address: int, data: bytes) -> None:
        """Store all of `data`, or Errno(EFAULT)."""

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill a buffer, or Errno(EFAULT)."""

    def write_from(self, address: int, buffer: memoryview) -> None:
        """Store a buffer, or Errno(EFAULT)."""


Piece = tuple[Copies, int, int]
"""Where a part of a range stands: in whose memory, address, bytes."""


def update_pieces(guest: GuestContext, address: int, size: int, pieces: list[Piece]) -> None:
    """LAUNCH_UPDATE_DATA of the caller's [address, address+size), which stands where the pieces say: in the caller's memory,
    but for what a VM of an RFC dialect keeps elsewhere. Raises as `update_data`.
    """
    guest.check_update(address, size)
    for memory, at, length in pieces:
        update_data(guest, memory, at, length)


def update_data(guest: GuestContext, memory: Copies, address: int, size: int) -> None:
    """LAUNCH_UPDATE_DATA of [address, address+size) of a memory. Raises FirmwareError (state, alignment) before anything
    changes, or Errno(EFAULT).
    """
    guest.check_update(address, size)
    first = min(-address % UNIT, size)
    whole = (size - first) // UNIT * UNIT
    _one_by_one(guest, memory, address, first)
    if whole < _LARGE:
        _one_by_one(guest, memory, address + first, whole)
    else:
        _side_by_side(guest, memory, address + first, whole)
    _one_by_one(guest, memory, address + first + whole, size - first - whole)


def _parts(address: int, size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """[address, address+size) in pieces that end at multiples of `chunk`."""
    end = address + size
    while address < end:
        part = min(chunk - address % chunk, end - address)
        yield address, part
        address += part


def _one_by_one(guest: GuestContext, memory: Copies, address: int, size: int) -> None:
    """Either whole units, or a part of one."""
    room, out = memoryview(bytearray(min(size, _CHUNK))), memoryview(bytearray(min(size, _CHUNK) + SLACK))
    for at, part in _parts(address, size, _CHUNK):
        plain = room[:part]
        memory.read_into(at, plain)
        guest.measure_data(plain)
        if part % UNIT:
            memory.write(at, guest.cipher.encrypt(at, plain))
        else:
            guest.cipher.encrypt_into(at, plain, out)
            memory.write_from(at, out[:part])


def _side_by_side(guest: GuestContext, memory: Copies, address: int, size: int) -> None:
    """Whole units: one piece is measured while the one before is stored and this one encrypted."""
    rooms, out = [memoryview(bytearray(_LARGE_CHUNK)) for _ in range(2)], memoryview(bytearray(_LARGE_CHUNK + SLACK))
    measured: list[Future[None] | None] = [None, None]  # of what stands in each room
    encrypted: tuple[int, memoryview] | None = None  # to be stored
    with ThreadPoolExecutor(1, thread_name_prefix="launch-digest") as digest:
        try:
            for turn, (at, part) in enumerate(_parts(address, size, _LARGE_CHUNK)):
                before, plain = measured[turn & 1], rooms[turn & 1][:part]
                if before is not None:
                    before.result()
                memory.read_into(at, plain)
                measured[turn & 1] = digest.submit(guest.measure_data, plain)
                if encrypted is not None:
                    store, encrypted = encrypted, None
                    memory.write_from(*store)
                guest.cipher.encrypt_into(at, plain, out)
                encrypted = at, out[:part]
        finally:
            if encrypted is not None:  # also when the next piece is not there: what was measured is stored
                memory.write_from(*encrypted)
