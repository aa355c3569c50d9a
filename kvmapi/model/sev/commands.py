"""KVM_MEMORY_ENCRYPT_OP: how a command gets to the function that does it, and those that make an SEV guest of a VM.

Two kinds of failure, as in the kernel: KVM's own are an errno and leave `error` alone; the firmware's are EIO with its
status in `error`, and `error` is 0 after a command that the firmware did, whatever KVM found wrong afterwards. A
command that was dispatched has its struct kvm_sev_cmd written back however it ends, and EFAULT there is the last word;
what fails before (unknown numbers, what a mirror may not do) leaves it alone.

Commands that mainline numbers but does not have (SEND and RECEIVE of VMSAs, CERT_EXPORT) are unknown; those of SEV-SNP
answer as on a VM that is no SNP guest. Source: sev_mem_enc_ioctl (arch/x86/kvm/svm/sev.c, 7.3).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from kvmapi.abi import kvm, sev
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.platform import SEV_TYPES
from kvmapi.model.sev import debug_commands, launch_commands, migration_commands
from kvmapi.model.sev.asids import pool_of
from kvmapi.model.sev.context import Command, SevContext

_COMMAND = struct.Struct("<IIQII")
_INIT = struct.Struct("<QIH34x")
_GHCB_VERSION_MAX = 2
_MIRROR_MAY = frozenset((sev.KVM_SEV_LAUNCH_UPDATE_VMSA, sev.KVM_SEV_GUEST_STATUS, sev.KVM_SEV_DBG_DECRYPT, sev.KVM_SEV_DBG_ENCRYPT))


def operation(context: SevContext, arg: int, caller: Caller) -> int:
    """The ioctl: 0, or Errno."""
    platform = context.vm.platform
    if not platform.has_sev or not platform.asids:
        raise Errno(errno.ENOTTY)
    if not arg:
        return 0
    fields = _COMMAND.unpack(caller.memory.read(arg, _COMMAND.size))
    with context.vm.mutex:
        context.refuse_if_dead()
        number = fields[0]
        if context.owner is not None and number not in _MIRROR_MAY:
            raise Errno(errno.EINVAL)
        handler = _HANDLERS.get(number)
        if handler is None:
            raise Errno(errno.EINVAL)
        if number == sev.KVM_SEV_ES_INIT and not platform.has_sev_es:
            raise Errno(errno.ENOTTY)
        command = Command(context, caller, fields)
        try:
            handler(command)
        finally:
            caller.memory.write(arg, _COMMAND.pack(*command.fields()))
    return 0


# ---- initialisation
def _legacy_init(command: Command) -> None:
    """INIT and ES_INIT: VMs of type 0 only; SEV-ES by version 1 of the GHCB protocol."""
    if command.context.vm.type != kvm.KVM_X86_DEFAULT_VM:
        raise Errno(errno.EINVAL)
    es = command.number == sev.KVM_SEV_ES_INIT
    _become_guest(command, es, ghcb_version=1 if es else 0)


def _init2(command: Command) -> None:
    """INIT2: VMs of an SEV type only, and once: after INIT2 or COPY nothing waits for it, after MOVE it finds a guest."""
    context = command.context
    if not context.need_init or context.vm.type not in SEV_TYPES:
        raise Errno(errno.EINVAL)
    features, flags, ghcb_version = command.read(_INIT)
    _become_guest(command, context.vm.type == kvm.KVM_X86_SEV_ES_VM, features, flags, ghcb_version)


def _become_guest(command: Command, es: bool, features: int = 0, flags: int = 0, ghcb_version: int = 0) -> None:
    context = command.context
    platform = context.vm.platform
    supported = platform.vmsa_features if es else 0
    if context.vm.vcpus or flags or features & ~supported or ghcb_version > (_GHCB_VERSION_MAX if es else 0) or context.active:
        raise Errno(errno.EINVAL)
    firmware = context.firmware  # made here if nobody has asked it for anything yet
    context.asid = pool_of(platform).take(es=es)
    firmware.init()
    context.active, context.es_active = True, es
    context.vmsa_features = features
    context.ghcb_version = ghcb_version or (_GHCB_VERSION_MAX if es else 0)
    context.need_init = False


# ---- SEV-SNP, on a VM that is none
def _no_snp_guest(command: Command) -> None:
    raise Errno(errno.ENOTTY)


def _no_snp_context(command: Command) -> None:
    raise Errno(errno.EINVAL)


_HANDLERS: dict[int, Callable[[Command], None]] = {
    sev.KVM_SEV_INIT: _legacy_init,
    sev.KVM_SEV_ES_INIT: _legacy_init,
    sev.KVM_SEV_INIT2: _init2,
    **launch_commands.HANDLERS,
    **debug_commands.HANDLERS,
    **migration_commands.HANDLERS,
    sev.KVM_SEV_SNP_LAUNCH_START: _no_snp_guest,
    sev.KVM_SEV_SNP_LAUNCH_UPDATE: _no_snp_context,
    sev.KVM_SEV_SNP_LAUNCH_FINISH: _no_snp_guest,
    sev.KVM_SEV_SNP_ENABLE_REQ_CERTS: _no_snp_context,
}
