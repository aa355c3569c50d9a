"""Test support: an SEV-ES guest of the model on its way through the launch, and what is behind its vCPUs' fds."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from kvmapi.abi import ioctls, sev
from kvmapi.abi import vcpu as v
from kvmapi.model.host import ModelHost
from kvmapi.model.vcpu import VcpuFile
from kvmapi.sev import SevPlatform
from kvmapi.vcpu import Vcpu
from tests.conformance.snippets import Machine

POLICY_ES = sev.SEV_POLICY_ES
PLAIN, SEV, SEV_ES = 0, 2, 3
BOTH = pytest.mark.parametrize("type", [SEV_ES, PLAIN], ids=["type3", "legacy"])


class EsGuest(Machine):
    """Initialised (KVM_SEV_INIT2, or KVM_SEV_ES_INIT on type 0), started, and with its vCPUs; `launch` encrypts their VMSAs."""

    def __init__(self, host: ModelHost, type: int = SEV_ES, vcpus: int = 1, features: int = 0, *, irqchip: bool = False) -> None:
        super().__init__(host, type)
        self.model = host
        self.platform = SevPlatform(host)
        self.closing.append(self.platform)
        if type == PLAIN:
            self.vm.sev_op(sev.KVM_SEV_ES_INIT)
        else:
            self.vm.sev_op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(vmsa_features=features))
        if irqchip:
            self.vm.create_irqchip()
        for _ in range(vcpus):
            self.add_vcpu()
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start(policy=POLICY_ES), self.platform.fd)

    def launch(self) -> EsGuest:
        """LAUNCH_UPDATE_VMSA."""
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA)
        return self

    def file(self, number: int = 0) -> VcpuFile:
        """The model's side of a vCPU."""
        file = self.model.file(self.vcpus[number].fd)
        assert isinstance(file, VcpuFile)
        return file

    def launch_digest(self) -> bytes:
        """What the firmware has measured, from its attestation report: once LAUNCH_MEASURE is done."""
        room = (ctypes.c_uint8 * 208)()
        command = sev.kvm_sev_attestation_report(uaddr=ctypes.addressof(room), len=len(room))
        self.vm.sev_op(sev.KVM_SEV_GET_ATTESTATION_REPORT, command)
        return bytes(room)[16:48]


def raw(vcpu: Vcpu, request: int, argument: Any) -> int:
    """The errno of an ioctl on a struct, a buffer or an address; 0 for success."""
    address = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result: int = vcpu.ioctl_raw(request, address)
    return max(0, -result)


def set_up(guest: EsGuest, number: int = 0, rip: int = 0x100000) -> tuple[v.kvm_regs, v.kvm_sregs]:
    """64-bit mode, unmistakable registers. There is no code and no way to handle an exception: a guest that runs shuts down."""
    vcpu = guest.vcpus[number]
    regs = v.kvm_regs(rip=rip, rflags=2, rsp=0x20000 + number, **{f"r{n}": 0x5EC0DE00 + n for n in range(8, 16)})
    sregs = vcpu.get_sregs()
    flat = {"present": 1, "s": 1, "g": 1, "limit": 0xFFFFFFFF}
    sregs.cs = v.kvm_segment(selector=8, type=11, l=1, **flat)
    for name in ("ds", "es", "ss"):
        setattr(sregs, name, v.kvm_segment(selector=16, type=3, db=1, **flat))
    sregs.idt.limit = 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80050033, 0x8000, 0x620, 0xD01
    vcpu.set_regs(regs)
    vcpu.set_sregs(sregs)
    return regs, sregs


def measure(guest: Machine) -> None:
    """LAUNCH_MEASURE and LAUNCH_FINISH: the guest may run."""
    room = (ctypes.c_uint8 * 48)()
    guest.vm.sev_op(sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure(ctypes.addressof(room), 48))
    guest.vm.sev_op(sev.KVM_SEV_LAUNCH_FINISH)


__all__ = ["BOTH", "PLAIN", "POLICY_ES", "SEV", "SEV_ES", "EsGuest", "ioctls", "measure", "raw", "set_up"]
