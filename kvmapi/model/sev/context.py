"""What KVM keeps of one VM's encryption (struct kvm_sev_info), and how a command of it reaches the firmware.

    VM without encryption --INIT, INIT2: ASID--> active --LAUNCH_START, RECEIVE_START: handle--> the firmware's guest

KVM knows the guest by its handle only and asks the firmware for it at each command, through the /dev/sev fd that the
guest was started with: close that fd, and commands fail with EBADF; before the start it is fd 0 that is looked at, and
handle 0 that the firmware does not know. Several contexts may name one guest: a *mirror* has another VM's ASID and
handle and keeps that VM alive; a *dead* VM gave its own away (sharing.py).

Locks, in this order: `vm.mutex` (kvm->lock), then vCPUs' mutexes, then the engine lock (`vm.paused()`).
Source: arch/x86/kvm/svm/sev.c of 7.3, as for all modules beside this one.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, TypeVar, cast

from kvmapi.abi import psp, sev
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.mem.private import EncryptedPhysical
from kvmapi.model.platform import C_BIT, SEV_TYPES
from kvmapi.model.sev.asids import pool_of
from kvmapi.model.sev.regions import Pins
from kvmapi.model.sev.status import FirmwareError

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpuid import Table
    from kvmapi.model.mem.cipher import PageCipher
    from kvmapi.model.sev.firmware import Firmware
    from kvmapi.model.sev.guest import GuestContext
    from kvmapi.model.vcpu import VcpuFile
    from kvmapi.model.vm import VmFile

T = TypeVar("T")
FAMILY_LOCK = threading.Lock()
os.register_at_fork(after_in_child=FAMILY_LOCK._at_fork_reinit)  # type: ignore[attr-defined]  # a child closes its copies of VMs
"""Protects `owner` and `mirrors` of all contexts (sev_mirror_lock)."""


class SevContext:
    """One VM's side of its encryption. A VM that was never initialised has one too, inactive."""

    def __init__(self, vm: VmFile) -> None:
        self.vm = vm
        self.active = False
        self.es_active = False
        self.need_init = vm.type in SEV_TYPES  # KVM_RUN waits for INIT2; a MOVE does not lift this
        self.vmsa_features = 0
        self.ghcb_version = 0
        self.ap_jump_table = 0  # a GPA that the guest's firmware leaves for its kernel
        self.asid = 0
        self.handle = 0
        self.fd = 0  # of /dev/sev, as the start found it
        self.pins = Pins()
        self.owner: SevContext | None = None  # of whose guest this is a mirror; its VM is held
        self.mirrors: list[SevContext] = []
        self.sharing = False  # a COPY or MOVE is under way
        self.dead = False

    # ---- what the rest of the VM asks
    def may_run(self) -> bool:
        """May a vCPU enter? A VM of an SEV type needs INIT2 first; Errno(EIO) when the VM is dead."""
        self.refuse_if_dead()
        return not self.need_init

    def refuse_if_dead(self) -> None:
        """Errno(EIO) for a VM that died while its ioctl waited for a mutex."""
        if self.dead:
            raise Errno(errno.EIO)

    def c_mask_offered(self, table: Table) -> int:
        """The C-bit, where the guest's CPUID makes KVM accept it in CR3."""
        return 1 << C_BIT if self.active else 0

    def before_slot_change(self) -> None:
        """While no vCPU runs: what stands decrypted in the arena goes back to the caller's memory as ciphertext."""
        physical = self.vm.physical
        if isinstance(physical, EncryptedPhysical) and physical.secure is not None:
            physical.secure.save_all()

    def destroy(self) -> None:
        """The VM ends. A mirror lets go of its owner; whoever owns the guest takes it and the ASID with it."""
        if not self.active:
            return
        self.active = False
        with FAMILY_LOCK:
            owner, self.owner = self.owner, None
            if owner is not None:
                owner.mirrors.remove(self)
        if owner is not None:
            owner.vm.release()
            return
        self.pins = Pins()
        if self.handle:
            with suppress(FirmwareError):
                self.unbind(self.firmware.guest(self.handle))
        pool_of(self.vm.platform).give(self.asid)

    # ---- for the commands
    @property
    def firmware(self) -> Firmware:
        """The PSP."""
        return self.vm.platform.firmware

    def vcpus(self) -> list[VcpuFile]:
        """All vCPUs, in the order of their creation."""
        return cast("list[VcpuFile]", list(self.vm.vcpus.values()))

    def unbind(self, guest: GuestContext) -> None:
        """DEACTIVATE and DECOMMISSION; nobody listens to what the firmware says to it."""
        with suppress(FirmwareError):
            self.firmware.deactivate(guest)
        with suppress(FirmwareError):
            self.firmware.decommission(guest)

    def give_key(self, cipher: PageCipher) -> None:
        """The ASID has a key from now on, for this VM and its mirrors."""
        with FAMILY_LOCK:
            family = (self, *self.mirrors)
        with self.vm.paused():  # mirrors share the engine lock
            for context in family:
                if isinstance(context.vm.physical, EncryptedPhysical):
                    context.vm.physical.activate(cipher)
                    context.vm.mappings_changed()

    @contextmanager
    def guest_memory(self) -> Iterator[None]:
        """For a command that reads or writes guest pages: no vCPU runs inside, and nothing stands decrypted."""
        with self.vm.paused():
            self.before_slot_change()
            yield


class Command:
    """One KVM_MEMORY_ENCRYPT_OP on its way: struct kvm_sev_cmd, whose VM it is for, and who asks."""

    def __init__(self, context: SevContext, caller: Caller, fields: tuple[int, int, int, int, int]) -> None:
        self.context = context
        self.caller = caller
        self.memory = caller.memory
        self.number, self._pad, self.data, self.error, self.sev_fd = fields
        self._struct = b""  # the command's own, as it was read

    def fields(self) -> tuple[int, int, int, int, int]:
        """struct kvm_sev_cmd as it is written back."""
        return self.number, self._pad, self.data, self.error, self.sev_fd

    def guest_only(self, number: int = errno.ENOTTY) -> SevContext:
        """The context; the errno `number` unless the VM is an SEV guest."""
        if not self.context.active:
            raise Errno(number)
        return self.context

    # ---- the command's own struct
    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        """copy_from_user of it: EFAULT."""
        self._struct = self.memory.read(self.data, layout.size)
        return layout.unpack(self._struct)

    def answer(self, fields: dict[int, int]) -> None:
        """copy_to_user of it, with some 32-bit fields (by their offsets) changed and all else as it was read: EFAULT."""
        changed = bytearray(self._struct)
        for offset, value in fields.items():
            changed[offset : offset + 4] = value.to_bytes(4, "little")
        self.memory.write(self.data, bytes(changed))

    def blob(self, address: int, size: int) -> bytes:
        """What psp_copy_user_blob copies for the firmware: EINVAL for nothing or more than 16 KiB, EFAULT."""
        if not address or not size or size > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EINVAL)
        return self.memory.read(address, size)

    # ---- the firmware
    def issue(self, run: Callable[[GuestContext], T], *, alone: bool = True) -> T:
        """A command about the guest, through the fd that it was started with: EBADF, or EIO with the status in `error`.

        The firmware does one command at a time; not `alone` is what may take long and no mirror can send.
        """
        context = self.context
        self._device(context.fd)
        with context.firmware.lock if alone else nullcontext():
            return self.call(lambda: run(context.firmware.guest(context.handle)))

    def issue_start(self, run: Callable[[], T]) -> T:
        """A command that starts a guest, through the fd that the caller names now."""
        self._device(self.sev_fd)
        return self.call(run)

    def call(self, run: Callable[[], T]) -> T:
        """Let the firmware do it: `error` is its status, 0 when it succeeded, else with EIO."""
        try:
            result = run()
        except FirmwareError as failure:
            self.error = failure.status
            raise Errno(errno.EIO) from None
        self.error = psp.SEV_RET_SUCCESS
        return result

    def _device(self, fd: int) -> None:
        from kvmapi.model.sev.device import SevDevice

        if not isinstance(self.caller.file(fd), SevDevice):
            raise Errno(errno.EBADF)
