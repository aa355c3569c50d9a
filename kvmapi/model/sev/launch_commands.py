"""The commands of a launch, status and report: what KVM checks and copies around the firmware's part.

What a command changed in the firmware stays changed when KVM cannot tell the caller (EFAULT): a guest whose measurement
could not be copied has been measured all the same. Only a start is undone then.

LAUNCH_UPDATE_VMSA takes the vCPUs in the order of their creation and stops at the first that it cannot take; those
before stay taken. (A vCPU whose fd was closed is none that the model could take; the kernel's lives on.) LAUNCH_SECRET
wants physically contiguous memory; the model, which does not know where pages are, takes what every host can promise,
one page, and refuses a range over two.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmapi.abi import cert, psp, sev
from kvmapi.model import launched
from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.sev import stream
from kvmapi.model.sev.context import Command, SevContext
from kvmapi.model.sev.status import FirmwareError

if TYPE_CHECKING:
    from kvmapi.model.sev.guest import GuestContext
    from kvmapi.model.vcpu import VcpuFile

START = struct.Struct("<IIQI4xQI4x")
HANDLE_AT = 0
_RANGE = struct.Struct("<QI4x")
_LENGTH_AT, _REPORT_LENGTH_AT = 8, 24
_SECRET = struct.Struct("<QI4xQI4xQI4x")
_STATUS = struct.Struct("<III")
_REPORT = struct.Struct("<QQQI4x")


def bind(command: Command, start: Callable[[], GuestContext]) -> None:
    """A start: make the firmware's guest, give it the VM's ASID, tell the caller its handle; all of it, or nothing."""
    context = command.context
    guest = command.issue_start(start)
    try:
        command.call(lambda: context.firmware.activate(guest, context.asid))
        command.answer({HANDLE_AT: guest.handle})
    except BaseException:
        context.unbind(guest)
        raise
    context.handle, context.fd = guest.handle, command.sev_fd
    context.give_key(guest.cipher)


def _launch_start(command: Command) -> None:
    context = command.guest_only()
    handle, policy, dh_at, dh_size, session_at, session_size = command.read(START)
    dh_cert = command.blob(dh_at, dh_size) if dh_at else b""
    session = command.blob(session_at, session_size) if session_at else b""
    bind(command, lambda: context.firmware.launch_start(policy, dh_cert, session, handle))


def _update_data(command: Command) -> None:
    context = command.guest_only()
    address, size = command.read(_RANGE)
    context.pins.check_range(address, size, command.caller)
    pieces = context.vm.launch_pieces(address, size)
    with context.guest_memory():
        command.issue(lambda guest: stream.update_pieces(guest, address, size, pieces), alone=False)


# ---- LAUNCH_UPDATE_VMSA
def lock_vcpus(stack: ExitStack, context: SevContext) -> list[VcpuFile]:
    """All vCPUs of a VM, none of them inside an ioctl until the stack unwinds (kvm_lock_all_vcpus)."""
    vcpus = context.vcpus()
    for vcpu in vcpus:
        stack.enter_context(vcpu.held())
    return vcpus


def _update_vmsa(command: Command) -> None:
    context = command.context
    if not context.es_active:
        raise Errno(errno.ENOTTY)
    with ExitStack() as stack:
        for vcpu in lock_vcpus(stack, context):
            if vcpu.dead:
                raise Errno(errno.EINVAL)
            page = vcpu.vmsa()  # EINVAL for one that is debugged, or was launched already
            command.issue(lambda guest, page=page: guest.update_vmsa(page))  # type: ignore[misc]
            launched.protect(vcpu)


# ---- secrets, measurements and reports
def _launch_secret(command: Command) -> None:
    context = command.guest_only()
    header_at, header_size, address, size, trans_at, trans_size = command.read(_SECRET)
    context.pins.check_range(address, size, command.caller)
    if address // PAGE != (address + size - 1) // PAGE:
        raise Errno(errno.EINVAL)
    trans = command.blob(trans_at, trans_size)
    header = command.blob(header_at, header_size)
    with context.guest_memory():
        command.memory.write(address, command.issue(lambda guest: guest.launch_secret(address, header, trans, size)))


def _fetch(command: Command, at: int, size: int, run: Callable[[GuestContext, int], bytes], needed: int, length_at: int) -> None:
    """A blob of `needed` bytes that the firmware makes for a buffer of the caller's.

    Size 0 asks how long it is: the answer is written whatever the firmware says. Without an address the firmware is
    offered no room, but no answer is written. With room, all of it is overwritten: the blob, then zeroes.
    """
    room = size if at else 0
    if room > sev.SEV_FW_BLOB_MAX_SIZE:
        raise Errno(errno.EINVAL)
    told = 0

    def ask(guest: GuestContext) -> bytes:
        nonlocal told
        try:
            return run(guest, room)
        except FirmwareError as failure:
            told = needed if failure.status == psp.SEV_RET_INVALID_LEN else 0
            raise

    try:
        blob = command.issue(ask)
    except Errno:
        if not size:
            command.answer({length_at: told})
        raise
    try:
        command.memory.write(at, blob.ljust(room, b"\0"))
    finally:
        command.answer({length_at: needed})


def _launch_measure(command: Command) -> None:
    command.guest_only()
    at, size = command.read(_RANGE)

    def measure(guest: GuestContext, room: int) -> bytes:
        guest.require(sev.SEV_STATE_LAUNCH_UPDATE)
        if room < sev.MEASURE_SIZE:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        return guest.measure()

    _fetch(command, at, size, measure, sev.MEASURE_SIZE, _LENGTH_AT)


def _attestation_report(command: Command) -> None:
    command.guest_only()
    low, high, at, size = command.read(_REPORT)
    nonce = struct.pack("<QQ", low, high)

    def report(guest: GuestContext, room: int) -> bytes:
        made = guest.attestation_report(nonce)
        if room < len(made):
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        return made

    _fetch(command, at, size, report, cert.SEV_ATTESTATION_REPORT_SIZE, _REPORT_LENGTH_AT)


def _launch_finish(command: Command) -> None:
    command.guest_only()
    command.issue(lambda guest: guest.finish())


def _guest_status(command: Command) -> None:
    command.guest_only()
    status = command.issue(lambda guest: (guest.handle, guest.policy, guest.state))
    command.memory.write(command.data, _STATUS.pack(*status))


HANDLERS: dict[int, Callable[[Command], None]] = {
    sev.KVM_SEV_LAUNCH_START: _launch_start,
    sev.KVM_SEV_LAUNCH_UPDATE_DATA: _update_data,
    sev.KVM_SEV_LAUNCH_UPDATE_VMSA: _update_vmsa,
    sev.KVM_SEV_LAUNCH_SECRET: _launch_secret,
    sev.KVM_SEV_LAUNCH_MEASURE: _launch_measure,
    sev.KVM_SEV_LAUNCH_FINISH: _launch_finish,
    sev.KVM_SEV_GUEST_STATUS: _guest_status,
    sev.KVM_SEV_GET_ATTESTATION_REPORT: _attestation_report,
}
