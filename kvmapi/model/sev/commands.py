"""KVM_MEMORY_ENCRYPT_OP and the region ioctls of one VM: KVM's ordered checks in front of the firmware.

Two kinds of failure, as in the kernel: KVM's own are an errno and leave `error` alone; the firmware's are EIO with
its status in `error`. What fails before a command is dispatched does not write the struct back. Source: kvm-sev-uapi
facts §7 (arch/x86/kvm/svm/sev.c).
"""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import kvm, psp, sev
from kvmapi.model.caller import PAGE, USER_TOP, Caller, Errno
from kvmapi.model.files import Foreign
from kvmapi.model.platform import C_BIT, SEV_TYPES
from kvmapi.model.sev.firmware import FirmwareError, GuestContext

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpuid import Table
    from kvmapi.model.vm import VmFile

_COMMAND = struct.Struct("<IIQII")
_CHUNK = 256 * 1024  # bytes of a launch update in flight
_MEASURE_SIZE = 48


class SevContext:
    """What KVM keeps of an SEV guest. On a VM that is none, every command answers ENOTTY."""

    def __init__(self, vm: VmFile) -> None:
        self._vm = vm
        self.active = False  # INIT or INIT2 succeeded
        self._asid: int | None = None
        self._guest: GuestContext | None = None
        self._regions: Counter[tuple[int, int]] = Counter()
        self._pinned = 0  # pages charged against RLIMIT_MEMLOCK
        self._status = 0
        self._commands: dict[int, Callable[[int, int, Caller], None]] = {
            sev.KVM_SEV_INIT: self._init,
            sev.KVM_SEV_ES_INIT: self._es_init,
            sev.KVM_SEV_INIT2: self._init2,
            sev.KVM_SEV_LAUNCH_START: self._launch_start,
            sev.KVM_SEV_LAUNCH_UPDATE_DATA: self._launch_update_data,
            sev.KVM_SEV_LAUNCH_UPDATE_VMSA: self._launch_update_vmsa,
            sev.KVM_SEV_LAUNCH_MEASURE: self._launch_measure,
            sev.KVM_SEV_LAUNCH_FINISH: self._launch_finish,
            sev.KVM_SEV_GUEST_STATUS: self._guest_status,
        }

    # ---- what the rest of the VM asks
    def may_run(self) -> bool:
        """KVM_RUN of an SEV-type VM needs INIT2 first."""
        return self.active or self._vm.type not in SEV_TYPES

    def c_mask_offered(self, table: Table) -> int:
        """The C-bit, where the guest's CPUID makes KVM accept it in CR3."""
        return 1 << C_BIT if self.active else 0

    def before_slot_change(self) -> None:
        """A memslot goes away: what is cached of it must be in the caller's memory first."""
        secure = getattr(self._vm.physical, "secure", None)
        if secure is not None:
            with_door = secure
            with_door.arena.open_door()
            with_door.evict_all()
            with_door.arena.close_door()

    def destroy(self) -> None:
        """The VM ends: the guest and its keys go, the ASID is free again."""
        firmware = self._vm.platform.firmware if self.active else None
        if firmware is None:
            return
        if self._guest is not None:
            firmware.decommission(self._guest)
            self._guest = None
        if self._asid is not None:
            firmware.give_asid(self._asid)
            self._asid = None

    # ---- KVM_MEMORY_ENCRYPT_OP
    def operation(self, arg: int, caller: Caller) -> int:
        """The ioctl: 0, or Errno."""
        if not self._vm.platform.has_sev:
            raise Errno(errno.ENOTTY)
        if not arg:
            return 0
        number, pad, data, _, sev_fd = command = _COMMAND.unpack(caller.memory.read(arg, _COMMAND.size))
        handler = self._commands.get(number)
        if handler is None:
            raise Errno(errno.EINVAL)
        self._status = command[3]
        try:
            with self._vm.paused():
                handler(data, sev_fd, caller)
        except FirmwareError as failure:
            self._status = failure.status
            raise Errno(errno.EIO) from None
        finally:
            caller.memory.write(arg, _COMMAND.pack(number, pad, data, self._status, sev_fd))
        return 0

    def _require_guest(self) -> None:
        if not self.active:
            raise Errno(errno.ENOTTY)

    def _started(self) -> GuestContext:
        """The firmware's guest; before LAUNCH_START the firmware knows no such handle."""
        if self._guest is None:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST)
        return self._guest

    # ---- initialisation
    def _init(self, data: int, sev_fd: int, caller: Caller) -> None:
        if self._vm.type != kvm.KVM_X86_DEFAULT_VM:
            raise Errno(errno.EINVAL)
        self._activate()

    def _es_init(self, data: int, sev_fd: int, caller: Caller) -> None:
        if self._vm.type != kvm.KVM_X86_DEFAULT_VM:
            raise Errno(errno.EINVAL)
        raise Errno(errno.ENOTTY)  # SEV-ES is off on this platform

    def _init2(self, data: int, sev_fd: int, caller: Caller) -> None:
        if self._vm.type not in SEV_TYPES or self.active:
            raise Errno(errno.EINVAL)
        features, flags, ghcb_version = struct.unpack("<QIH34x", caller.memory.read(data, 48))
        if self._vm.vcpus or flags or features or ghcb_version:
            raise Errno(errno.EINVAL)
        self._activate()

    def _activate(self) -> None:
        if self._vm.vcpus or self.active:
            raise Errno(errno.EINVAL)
        if not self._vm.platform.asids:
            raise Errno(errno.ENOTTY)
        asid = self._vm.platform.firmware.take_asid()
        if asid is None:
            raise Errno(errno.EBUSY)
        self._asid = asid
        self.active = True

    # ---- launch
    @staticmethod
    def _blob(address: int, size: int, caller: Caller) -> bytes:
        if not address:
            return b""
        if not size or size > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EINVAL)
        return caller.memory.read(address, size)

    def _launch_start(self, data: int, sev_fd: int, caller: Caller) -> None:
        from kvmapi.model.mem.physical import EncryptedPhysical
        from kvmapi.model.sev.device import SevDevice

        self._require_guest()
        layout = "<IIQI4xQI4x"
        _, policy, dh, dh_size, session, session_size = struct.unpack(layout, caller.memory.read(data, 40))
        certificate, blob = self._blob(dh, dh_size, caller), self._blob(session, session_size, caller)
        file = caller.file(sev_fd)
        if isinstance(file, Foreign) or not isinstance(file, SevDevice):
            raise Errno(errno.EBADF)
        if self._guest is not None:
            raise FirmwareError(psp.SEV_RET_INVALID_GUEST_STATE)  # the context is in use
        self._guest = guest = self._vm.platform.firmware.launch_start(policy, certificate, blob)
        self._status = psp.SEV_RET_SUCCESS
        physical = self._vm.physical
        if isinstance(physical, EncryptedPhysical):
            physical.activate(guest.cipher)
        caller.memory.write(data, struct.pack(layout, guest.handle, policy, dh, dh_size, session, session_size))

    def _launch_update_data(self, data: int, sev_fd: int, caller: Caller) -> None:
        self._require_guest()
        address, size = struct.unpack("<QI4x", caller.memory.read(data, 16))
        self._check_pin(address, size, caller)
        guest = self._started()
        guest.require(sev.SEV_STATE_LAUNCH_UPDATE)
        if address % 16:
            raise FirmwareError(psp.SEV_RET_INVALID_ADDRESS)
        if size % 16:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        self.before_slot_change()  # nothing of the range may linger decrypted in the arena
        end = address + size
        while address < end:
            part = min(_CHUNK - address % PAGE, end - address)
            caller.memory.write(address, guest.update_data(address, caller.memory.read(address, part)))
            address += part
        self._status = psp.SEV_RET_SUCCESS

    def _launch_update_vmsa(self, data: int, sev_fd: int, caller: Caller) -> None:
        raise Errno(errno.ENOTTY)  # not an SEV-ES guest

    def _launch_measure(self, data: int, sev_fd: int, caller: Caller) -> None:
        self._require_guest()
        address, size = struct.unpack("<QI4x", caller.memory.read(data, 16))
        if size and address and size > sev.SEV_FW_BLOB_MAX_SIZE:
            raise Errno(errno.EINVAL)
        guest = self._started()
        guest.require(sev.SEV_STATE_LAUNCH_UPDATE)
        if not size:
            caller.memory.write(data, struct.pack("<QI4x", address, _MEASURE_SIZE))
        if size < _MEASURE_SIZE:
            raise FirmwareError(psp.SEV_RET_INVALID_LEN)
        if not address:
            raise FirmwareError(psp.SEV_RET_INVALID_ADDRESS)
        caller.memory.read(address, _MEASURE_SIZE)  # the state changes with the measurement: nothing may fail after it
        blob = guest.measure()
        self._status = psp.SEV_RET_SUCCESS
        caller.memory.write(address, blob)
        caller.memory.write(data, struct.pack("<QI4x", address, _MEASURE_SIZE))

    def _launch_finish(self, data: int, sev_fd: int, caller: Caller) -> None:
        self._require_guest()
        self._started().finish()
        self._status = psp.SEV_RET_SUCCESS

    def _guest_status(self, data: int, sev_fd: int, caller: Caller) -> None:
        self._require_guest()
        guest = self._started()
        self._status = psp.SEV_RET_SUCCESS
        caller.memory.write(data, struct.pack("<III", guest.handle, guest.policy, guest.state))

    # ---- pinned memory
    def _check_pin(self, address: int, size: int, caller: Caller) -> int:
        """The pages of [address, address+size) that pinning would charge; EINVAL or ENOMEM as sev_pin_memory says."""
        if not size or address + size >= 1 << 64:
            raise Errno(errno.EINVAL)
        pages = (address + size - 1) // PAGE - address // PAGE + 1
        limit = caller.memlock_limit()
        if limit is not None and self._pinned + pages > limit // PAGE:
            raise Errno(errno.ENOMEM)
        if address + size > USER_TOP or not caller.memory.pinnable(address, size):
            raise Errno(errno.ENOMEM)
        return pages

    def register_region(self, arg: int, caller: Caller) -> int:
        """KVM_MEMORY_ENCRYPT_REG_REGION: pin host virtual [addr, addr+size)."""
        self._region_guest()
        address, size = struct.unpack("<QQ", caller.memory.read(arg, 16))
        self._pinned += self._check_pin(address, size, caller)
        self._regions[address, size] += 1
        return 0

    def unregister_region(self, arg: int, caller: Caller) -> int:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION: must name one registration exactly."""
        self._region_guest()
        address, size = struct.unpack("<QQ", caller.memory.read(arg, 16))
        if not self._regions[address, size]:
            del self._regions[address, size]
            raise Errno(errno.EINVAL)
        with self._vm.paused():
            self.before_slot_change()
        self._regions[address, size] -= 1
        self._pinned -= (address + size - 1) // PAGE - address // PAGE + 1
        if not self._regions[address, size]:
            del self._regions[address, size]
        return 0

    def _region_guest(self) -> None:
        if not self._vm.platform.has_sev or not self.active:
            raise Errno(errno.ENOTTY)
