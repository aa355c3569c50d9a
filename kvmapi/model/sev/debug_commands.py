"""DBG_DECRYPT and DBG_ENCRYPT: a debugger's view into encrypted memory, at any address and of any length.

The firmware moves whole 16-byte blocks inside one page. KVM cuts the range where either side crosses a page, and does
what is not aligned through a buffer of its own: it decrypts the blocks around the source, or around the destination, to
put the new bytes among the old ones and encrypt them again. Pieces before one that fails stay done. Source and
destination are host virtual; "decrypt" reads guest memory at the source, "encrypt" writes it at the destination.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from kvmapi.abi import sev
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.sev.context import Command
from kvmapi.wiping import wipe

_DEBUG = struct.Struct("<QQI4x")
_BLOCK = 16
_U64 = 1 << 64


def _debug(command: Command) -> None:
    context, caller = command.guest_only(), command.caller
    source, target, size = command.read(_DEBUG)
    if not size or not source or not target or source + size >= _U64 or target + size >= _U64:
        raise Errno(errno.EINVAL)
    move = _decrypt if command.number == sev.KVM_SEV_DBG_DECRYPT else _encrypt
    done = 0
    with context.guest_memory():
        while done < size:
            part = min(size - done, PAGE - source % PAGE, PAGE - target % PAGE)
            context.pins.check_page(source, caller, write=False)
            context.pins.check_page(target, caller, write=True, pinned=1)
            move(command, source, target, part)
            source, target, done = source + part, target + part, done + part


def _blocks(address: int, size: int) -> tuple[int, int]:
    """The whole blocks around [address, address+size): where they begin, and how many bytes they are."""
    first = address & -_BLOCK
    return first, (address + size - first + _BLOCK - 1) & -_BLOCK


def _aligned(source: int, target: int, size: int) -> bool:
    return not (source | target | size) % _BLOCK


def _decrypt(command: Command, source: int, target: int, size: int) -> None:
    """Guest memory at `source`, in the clear to `target`. Both in one page each."""
    memory = command.memory
    first, whole = (source, size) if _aligned(source, target, size) else _blocks(source, size)
    plain = command.issue(lambda guest: guest.dbg_decrypt(first, memory.read(first, whole)))
    try:
        memory.write(target, plain[source - first : source - first + size])
    finally:
        wipe(plain)


def _encrypt(command: Command, source: int, target: int, size: int) -> None:
    """The caller's bytes at `source` into guest memory at `target`. Both in one page each."""
    memory = command.memory
    if _aligned(source, target, size):
        memory.write(target, command.issue(lambda guest: guest.dbg_encrypt(target, memory.read(source, size))))
        return
    first, whole = _blocks(target, size)
    around = bytearray(command.issue(lambda guest: guest.dbg_decrypt(first, memory.read(first, whole))))
    try:
        around[target - first : target - first + size] = memory.read(source, size)
        memory.write(first, command.issue(lambda guest: guest.dbg_encrypt(first, bytes(around))))
    finally:
        wipe(around)


HANDLERS: dict[int, Callable[[Command], None]] = {sev.KVM_SEV_DBG_DECRYPT: _debug, sev.KVM_SEV_DBG_ENCRYPT: _debug}
