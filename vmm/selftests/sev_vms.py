"""VMs of SEV and SEV-ES guests for tests that give the commands themselves, as the kernel's selftests do: bare, without machine or devices.

Every step checks what KVM and the firmware answer, the guest's state with it: a step that returns has done what it should.
"""

from __future__ import annotations

import ctypes
import mmap

from kvmapi.abi import ioctls, psp
from kvmapi.abi import sev as s
from kvmapi.launch import guest_status
from kvmapi.session import OwnerSession
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from kvmapi.vcpu import Vcpu
from kvmapi.vm import Vm
from vmm.selftests import hostmem
from vmm.selftests.checks import check_equal

DEFAULT_VM, SEV_VM, SEV_ES_VM = 0, 2, 3
MEASURE_ROOM = 256
"""Bytes offered to LAUNCH_MEASURE, more than it needs."""


def op(vm: Vm, command: int, data: ctypes.Structure | int | None = None, sev_fd: int = 0) -> tuple[int, int]:
    """KVM_MEMORY_ENCRYPT_OP as it is: its result or -errno, and `error`, which starts as success."""
    address = data if isinstance(data, int) else 0 if data is None else ctypes.addressof(data)
    argument = s.kvm_sev_cmd(id=command, data=address, error=psp.SEV_RET_SUCCESS, sev_fd=sev_fd)
    return vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(argument)), int(argument.error)


class SevGuest:
    """A VM with vCPUs, and as far as the test drives it a SEV guest in it. `memory`: its private memory at GPA 0, at `hva` here.

    `updates`: the pieces (offset, bytes) of it that `start` encrypts and measures, in order; at first all of it in one. `mac` and `nonce`:
    what LAUNCH_MEASURE said.

    >>> guest = SevGuest(system, platform, es=False, vcpus=4).init().start(0)        # doctest: +SKIP
    >>> guest.measure().finish().close()                                             # doctest: +SKIP
    """

    def __init__(self, system: System, platform: SevPlatform | None = None, *, es: bool = False, type: int = DEFAULT_VM) -> None:
        """A bare VM of `type`; 0 is what KVM_SEV_INIT and KVM_SEV_ES_INIT take, 2 and 3 what KVM_SEV_INIT2 takes."""
        self.es = es
        self.platform = platform
        self.vm = system.create_vm(type)
        self.vcpus: list[Vcpu] = []
        self.memory: mmap.mmap | None = None
        self.hva = 0
        self.updates: list[tuple[int, int]] = []
        self.mac = self.nonce = b""

    @property
    def sev_fd(self) -> int:
        """The fd of /dev/sev that goes with every command."""
        return 0 if self.platform is None else self.platform.fd

    def command(self, command: int, data: ctypes.Structure | None = None) -> None:
        """A KVM_SEV_* command that must work; raises KvmError with its words."""
        self.vm.sev_op(command, data, self.sev_fd)

    def init(self) -> SevGuest:
        """KVM_SEV_INIT or KVM_SEV_ES_INIT on a VM of type 0, KVM_SEV_INIT2 on the others."""
        if self.vm.type == DEFAULT_VM:
            self.command(s.KVM_SEV_ES_INIT if self.es else s.KVM_SEV_INIT)
        else:
            self.command(s.KVM_SEV_INIT2, s.kvm_sev_init())
        return self

    def add_vcpus(self, count: int, first: int = 0) -> SevGuest:
        """More vCPUs, with ids from `first` on."""
        for id in range(first, first + count):
            self.vcpus.append(self.vm.create_vcpu(id))
        return self

    def add_memory(self, data: bytes) -> SevGuest:
        """Whole pages at GPA 0, holding `data`, pinned; the launch encrypts and measures them."""
        self.memory = mmap.mmap(-1, len(data), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self.memory[:] = data
        self.hva = hostmem.address_of(self.memory)
        self.vm.set_user_memory_region(0, 0, len(data), self.hva)
        self.vm.register_enc_region(self.hva, len(data))
        self.updates = [(0, len(data))]
        return self

    def start(self, policy: int, owner: OwnerSession | None = None) -> SevGuest:
        """LAUNCH_START (for `owner`, if there is one), all memory, and for SEV-ES the VMSAs: the kernel test's launch up to here."""
        data = s.kvm_sev_launch_start(policy=policy)
        if owner is not None:
            certificate, session = (ctypes.create_string_buffer(blob, len(blob)) for blob in (owner.dh_cert, owner.session))
            data.dh_uaddr, data.dh_len = ctypes.addressof(certificate), len(certificate)
            data.session_uaddr, data.session_len = ctypes.addressof(session), len(session)
        self.command(s.KVM_SEV_LAUNCH_START, data)
        status = guest_status(self.vm)
        check_equal(status.policy, policy, "the policy after LAUNCH_START")
        check_equal(status.state, s.SEV_STATE_LAUNCH_UPDATE, "the state after LAUNCH_START")
        for at, size in self.updates:
            self.command(s.KVM_SEV_LAUNCH_UPDATE_DATA, s.kvm_sev_launch_update_data(uaddr=self.hva + at, len=size))
        if policy & s.SEV_POLICY_ES:
            self.command(s.KVM_SEV_LAUNCH_UPDATE_VMSA)
        return self

    def measure(self) -> SevGuest:
        """LAUNCH_MEASURE into more room than it needs."""
        room = ctypes.create_string_buffer(MEASURE_ROOM)
        data = s.kvm_sev_launch_measure(uaddr=ctypes.addressof(room), len=MEASURE_ROOM)
        self.command(s.KVM_SEV_LAUNCH_MEASURE, data)
        check_equal(data.len, s.MEASURE_SIZE, "the length that LAUNCH_MEASURE used")
        check_equal(guest_status(self.vm).state, s.SEV_STATE_LAUNCH_SECRET, "the state after LAUNCH_MEASURE")
        self.mac, self.nonce = room.raw[:32], room.raw[32 : s.MEASURE_SIZE]
        return self

    def finish(self) -> SevGuest:
        """LAUNCH_FINISH."""
        state = guest_status(self.vm).state
        assert state in (s.SEV_STATE_LAUNCH_UPDATE, s.SEV_STATE_LAUNCH_SECRET), "no state to finish a launch from"
        self.command(s.KVM_SEV_LAUNCH_FINISH)
        check_equal(guest_status(self.vm).state, s.SEV_STATE_RUNNING, "the state after LAUNCH_FINISH")
        return self

    def share(self, cap: int, source: SevGuest) -> None:
        """KVM_CAP_VM_{COPY,MOVE}_ENC_CONTEXT_FROM: take `source`'s guest; raises KvmError."""
        self.vm.enable_cap(cap, source.vm.fd)

    def close(self) -> None:
        """vCPUs, VM, memory. Safe to call twice."""
        while self.vcpus:
            self.vcpus.pop().close()
        self.vm.close()
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()
