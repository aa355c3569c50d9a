"""LAUNCH_UPDATE_DATA of any size: measured and encrypted where it stands, 256 KiB at a time.

The caller's memory is copied in and out with system calls that fail on what is not there (EFAULT), in two buffers that
are made once. Plaintext passes through these: LAUNCH_UPDATE_DATA is what makes memory secret, the caller had it in the
clear until now.

All checks come before the first byte changes; a range that loses its mapping in the middle keeps what was done, as
KVM's command does when the firmware fails in the middle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmapi.model.mem.cipher import SLACK, UNIT

if TYPE_CHECKING:
    from kvmapi.model.sev.guest import GuestContext

_CHUNK = 256 * 1024  # a multiple of UNIT; two of them stay in the cache


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
    room, out = memoryview(bytearray(min(size, _CHUNK))), memoryview(bytearray(_CHUNK + SLACK))
    end = address + size
    while address < end:
        part = min(_CHUNK - address % _CHUNK, end - address)
        plain = room[:part]
        memory.read_into(address, plain)
        guest.measure_data(plain)
        if address % UNIT or part % UNIT:
            memory.write(address, guest.cipher.encrypt(address, plain))
        else:
            guest.cipher.encrypt_into(address, plain, out)
            memory.write_from(address, out[:part])
        address += part
