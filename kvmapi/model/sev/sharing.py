"""One encryption context, several VMs: KVM_CAP_VM_COPY_ENC_CONTEXT_FROM and KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM.

COPY makes a *mirror*: a second VM with the ASID and handle of its owner, vCPUs of its own, and few commands. It keeps
the owner's VM alive. MOVE takes everything (ASID, handle, pins, mirrors, an SEV-ES guest's vCPU state) to another VM of
the same type and leaves the source *dead*: all its ioctls, and its vCPUs', answer EIO.

What KVM does not move is not moved here: the /dev/sev fd (commands look at fd 0 from then on), the GHCB version, and
that a VM of an SEV type waits for INIT2, which therefore can never run afterwards. Selftests move VMs of type 0 only.

Mirrors and what was moved share one engine lock: pages are decrypted in each VM's own arena, and only one of the family
may have them there at a time. The model sees encrypted memory by virtual address, so guests that share a context must
see it through the same mapping.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from kvmapi.model import launched
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.mem.private import EncryptedPhysical
from kvmapi.model.sev.context import FAMILY_LOCK, SevContext
from kvmapi.model.sev.launch_commands import lock_vcpus
from kvmapi.model.sev.regions import Pins

if TYPE_CHECKING:
    from kvmapi.model.vcpu import VcpuFile

_claims = threading.Lock()


@contextmanager
def _source(fd: int, caller: Caller) -> Iterator[SevContext]:
    """The VM behind the caller's fd (KVM takes 32 bits of the number), alive in the block: EBADF when it is none."""
    from kvmapi.model.vm import VmFile

    file = caller.file(fd & 0xFFFFFFFF)
    if not isinstance(file, VmFile) or not file.enter():
        raise Errno(errno.EBADF)
    try:
        yield file.sev
    finally:
        file.release()


@contextmanager
def _both(target: SevContext, source: SevContext) -> Iterator[None]:
    """Both VMs to ourselves: EINVAL for one and the same, EBUSY when either is being shared already (sev_lock_two_vms)."""
    if target is source:
        raise Errno(errno.EINVAL)
    with _claims:
        if target.sharing or source.sharing:
            raise Errno(errno.EBUSY)
        target.sharing = source.sharing = True
    try:
        with target.vm.mutex, source.vm.mutex:
            yield
    finally:
        target.sharing = source.sharing = False


def _usable(source: SevContext) -> bool:
    """Has it a context to share? A forked child's copy of a VM has not: the guest is its parent's."""
    return source.active and not source.vm.lost


def _take_key(target: SevContext, source: SevContext) -> None:
    """While neither VM runs: `target` sees memory by the key of `source`, and both take turns from now on."""
    source.before_slot_change()
    theirs, ours = source.vm.physical, target.vm.physical
    if isinstance(theirs, EncryptedPhysical) and theirs.secure is not None and isinstance(ours, EncryptedPhysical):
        ours.activate(theirs.secure.cipher)
    target.vm.mappings_changed()
    target.vm.lock = source.vm.lock


# ---- COPY
def copy_from(target: SevContext, fd: int, caller: Caller) -> None:
    """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: make `target` a mirror of the VM behind `fd`."""
    with _source(fd, caller) as source, _both(target, source):
        target.refuse_if_dead()
        if target.active or not _usable(source) or source.owner is not None or target.vm.vcpus:
            raise Errno(errno.EINVAL)
        with source.vm.paused(), target.vm.paused():
            source.vm.acquire()
            with FAMILY_LOCK:
                source.mirrors.append(target)
                target.owner = source
            target.active, target.es_active = True, source.es_active
            target.asid, target.handle, target.fd = source.asid, source.handle, source.fd
            target.need_init = False
            _take_key(target, source)


# ---- MOVE
def move_from(target: SevContext, fd: int, caller: Caller) -> None:
    """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: `target` takes the place of the VM behind `fd`, which is dead afterwards."""
    with _source(fd, caller) as source, _both(target, source):
        target.refuse_if_dead()
        if target.vm.type != source.vm.type or target.active or not _usable(source):
            raise Errno(errno.EINVAL)
        with ExitStack() as stack:
            ours, theirs = lock_vcpus(stack, target), lock_vcpus(stack, source)
            if source.es_active and (len(ours) != len(theirs) or any(vcpu.protected is None or vcpu.dead for vcpu in theirs)):
                raise Errno(errno.EINVAL)
            with source.vm.paused(), target.vm.paused():
                _move(target, source, ours, theirs)


def _move(target: SevContext, source: SevContext, ours: list[VcpuFile], theirs: list[VcpuFile]) -> None:
    _take_key(target, source)
    target.active, target.asid, target.handle = True, source.asid, source.handle
    target.es_active, target.vmsa_features = source.es_active, source.vmsa_features
    target.pins = source.pins
    source.active = source.es_active = False
    source.asid = source.handle = 0
    source.pins = Pins()
    _move_family(target, source)
    for index, vcpu in enumerate(ours):
        if vcpu.dead:  # its fd was closed
            continue
        vcpu.state.update_encryption()
        if target.es_active:
            launched.move(vcpu, theirs[index])
    _die(source, theirs)


def _move_family(target: SevContext, source: SevContext) -> None:
    """The source's mirrors become the target's; a source that is a mirror passes on its hold on the owner."""
    with FAMILY_LOCK:
        target.mirrors, source.mirrors = source.mirrors, []
        for mirror in target.mirrors:
            target.vm.acquire()
            source.vm.release()  # never the last: the command itself holds it
            mirror.owner = target
        owner, source.owner = source.owner, None
        target.owner = owner
        if owner is not None:
            owner.mirrors.remove(source)
            owner.mirrors.append(target)


def _die(source: SevContext, vcpus: list[VcpuFile]) -> None:
    """The VM is dead (kvm_vm_dead): no ioctl on it or its vCPUs does anything any more, and it sees no plaintext."""
    source.dead = True
    source.vm.refuse()
    for vcpu in vcpus:
        vcpu.refuse()
    physical = source.vm.physical
    if isinstance(physical, EncryptedPhysical) and physical.secure is not None:
        physical.secure.destroy()
        physical.secure = None
        source.vm.mappings_changed()
