"""SEND_* and RECEIVE_*: a guest's way to another platform, page by page, in packets for the other firmware only.

Lengths are asked for by size 0; the firmware answers INVALID_LEN and the length it wants. What is longer than that is
filled with zeroes: KVM copies its whole buffer out. Only SEND_START writes its struct back when the firmware fails, and
then with policy 0, because KVM takes the field from a firmware that did not fill it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from kvmapi.abi import cert, psp, sev
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.sev.context import Command
from kvmapi.model.sev.launch_commands import START, bind
from kvmapi.model.sev.status import FirmwareError

if TYPE_CHECKING:
    from kvmapi.model.sev.guest import GuestContext

_SEND_START = struct.Struct("<I4xQI4xQI4xQI4xQI4x")
_PACKET = struct.Struct("<QI4xQI4xQI4x")
_POLICY_AT, _SESSION_LENGTH_AT = 0, 64
_HEADER_LENGTH_AT, _TRANS_LENGTH_AT = 8, 40
_KMALLOC_MAX = 4 << 20  # the longest buffer that the kernel gets in one piece
_SESSION_SIZE = cert.SEV_SESSION_SIZE
_HEADER_SIZE = cert.SEV_SECRET_HEADER_SIZE


# ---- sending
def _send_start(command: Command) -> None:
    command.guest_only()
    _, pdh_at, pdh_size, plat_at, plat_size, amd_at, amd_size, session_at, session_size = command.read(_SEND_START)
    if not session_size:
        _ask_session_length(command)
    if not pdh_at or not pdh_size or not session_at or session_size > sev.SEV_FW_BLOB_MAX_SIZE:
        raise Errno(errno.EINVAL)
    pdh, plat_certs, amd_certs = command.blob(pdh_at, pdh_size), command.blob(plat_at, plat_size), command.blob(amd_at, amd_size)
    told_policy, told_size = 0, session_size

    def start(guest: GuestContext) -> bytes:
        nonlocal told_policy, told_size
        guest.require(sev.SEV_STATE_RUNNING)
        if session_size < _SESSION_SIZE:
            told_size = _SESSION_SIZE
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        session = guest.send_start(pdh, plat_certs, amd_certs)
        told_policy, told_size = guest.policy, len(session)
        return session

    def answer() -> None:
        command.answer({_POLICY_AT: told_policy, _SESSION_LENGTH_AT: told_size})

    try:
        session = command.issue(start)
    except Errno:
        answer()
        raise
    command.memory.write(session_at, session.ljust(session_size, b"\0"))
    answer()


def _ask_session_length(command: Command) -> NoReturn:
    """SEND_START with session_len 0: never succeeds."""
    told = 0

    def ask(guest: GuestContext) -> NoReturn:
        nonlocal told
        guest.require(sev.SEV_STATE_RUNNING)
        told = _SESSION_SIZE
        raise FirmwareError(psp.SEV_RET_INVALID_LEN)

    try:
        command.issue(ask)
    finally:
        command.answer({_SESSION_LENGTH_AT: told})


def _send_update_data(command: Command) -> None:
    context = command.guest_only()
    header_at, header_size, address, size, trans_at, trans_size = command.read(_PACKET)
    if not trans_size or not header_size:
        _ask_packet_lengths(command)
    if not trans_at or not address or not size or not header_at:
        raise Errno(errno.EINVAL)
    _one_page(address, size)
    context.pins.check_page(address, command.caller, write=False)
    if max(header_size, trans_size) > _KMALLOC_MAX:
        raise Errno(errno.ENOMEM)

    def send(guest: GuestContext) -> tuple[bytes, bytes]:
        guest.require(sev.SEV_STATE_SEND_UPDATE)
        if header_size < _HEADER_SIZE or trans_size < size:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        return guest.send_update_data(address, command.memory.read(address, size))

    with context.guest_memory():
        header, trans = command.issue(send)
    command.memory.write(trans_at, trans.ljust(trans_size, b"\0"))
    command.memory.write(header_at, header.ljust(header_size, b"\0"))


def _ask_packet_lengths(command: Command) -> NoReturn:
    """SEND_UPDATE_DATA with a length 0: the firmware is told no length at all, so it names the most a packet can need."""
    told_header = told_trans = 0

    def ask(guest: GuestContext) -> NoReturn:
        nonlocal told_header, told_trans
        guest.require(sev.SEV_STATE_SEND_UPDATE)
        told_header, told_trans = _HEADER_SIZE, PAGE
        raise FirmwareError(psp.SEV_RET_INVALID_LEN)

    try:
        command.issue(ask)
    finally:
        command.answer({_HEADER_LENGTH_AT: told_header, _TRANS_LENGTH_AT: told_trans})


def _one_page(address: int, size: int) -> None:
    """One packet is at most a page: EINVAL for more, and across a border."""
    if size > PAGE or address % PAGE + size > PAGE:
        raise Errno(errno.EINVAL)


def _send_finish(command: Command) -> None:
    command.guest_only()
    command.issue(lambda guest: guest.send_finish())


def _send_cancel(command: Command) -> None:
    command.guest_only()
    command.issue(lambda guest: guest.send_cancel())


# ---- receiving
def _receive_start(command: Command) -> None:
    context = command.guest_only()
    _, policy, pdh_at, pdh_size, session_at, session_size = command.read(START)
    if not pdh_at or not pdh_size or not session_at or not session_size:
        raise Errno(errno.EINVAL)
    pdh, session = command.blob(pdh_at, pdh_size), command.blob(session_at, session_size)
    bind(command, lambda: context.firmware.receive_start(policy, pdh, session))


def _receive_update_data(command: Command) -> None:
    context = command.guest_only(errno.EINVAL)
    fields = header_at, header_size, address, size, trans_at, trans_size = command.read(_PACKET)
    if not all(fields):
        raise Errno(errno.EINVAL)
    _one_page(address, size)
    header, trans = command.blob(header_at, header_size), command.blob(trans_at, trans_size)
    context.pins.check_page(address, command.caller, write=True)
    with context.guest_memory():
        command.memory.write(address, command.issue(lambda guest: guest.receive_update_data(address, header, trans, size)))


def _receive_finish(command: Command) -> None:
    command.guest_only()
    command.issue(lambda guest: guest.receive_finish())


HANDLERS: dict[int, Callable[[Command], None]] = {
    sev.KVM_SEV_SEND_START: _send_start,
    sev.KVM_SEV_SEND_UPDATE_DATA: _send_update_data,
    sev.KVM_SEV_SEND_FINISH: _send_finish,
    sev.KVM_SEV_SEND_CANCEL: _send_cancel,
    sev.KVM_SEV_RECEIVE_START: _receive_start,
    sev.KVM_SEV_RECEIVE_UPDATE_DATA: _receive_update_data,
    sev.KVM_SEV_RECEIVE_FINISH: _receive_finish,
}
