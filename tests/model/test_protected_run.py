"""An SEV-ES vCPU beyond its registers: what KVM_RUN takes, and says to a VMSA that was not launched; events; INIT and SIPI; a
move to another VM. What the guest does when it runs is in test_sev_es_guest.py.
"""

from __future__ import annotations

import struct
import threading
from errno import EINTR, EINVAL, EIO
from typing import Any

import pytest

from kvmapi.abi import caps, kvm, sev
from kvmapi.abi import vcpu as v
from kvmapi.errors import KvmError
from kvmapi.exits import FailEntry, Intr
from kvmapi.model import launched
from kvmapi.model import vmsa as model_vmsa
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.vmsa import difference
from tests.conformance.snippets import Machine
from tests.model.es_guest import BOTH, PLAIN, SEV_ES, EsGuest, ioctls, measure, raw, set_up

pytestmark = pytest.mark.model
LSTAR = 0xC0000082


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


# ---- KVM_RUN
@BOTH
def test_a_vmsa_that_was_not_launched_is_not_entered(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        measure(guest)
        assert guest.run() == FailEntry((1 << 64) - 1, 0)
        run = guest.vcpu.kvm_run
        assert (run.if_flag, run.ready_for_interrupt_injection, run.apic_base) == (0, 0, 0xFEE00900)
        runner = host.runner(guest.vcpu.fd)
        assert runner() == 0 and guest.run() == FailEntry((1 << 64) - 1, 0), "nor the next time"


@BOTH
def test_immediate_exit_comes_first(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        guest.launch()
        guest.vcpu.request_exit()
        assert raw(guest.vcpu, ioctls.KVM_RUN, 0) == EINTR
        assert not guest.file().entered


def test_interrupts_were_not_on_yet(host: ModelHost) -> None:
    """The processor tells KVM of IF when it has run the guest."""
    with EsGuest(host) as guest:
        guest.regs(rflags=0x202)
        guest.launch()
        guest.vcpu.request_exit()
        assert guest.run() == Intr() and guest.vcpu.kvm_run.if_flag == 0


def test_cpuid_is_fixed_by_the_attempt(host: ModelHost) -> None:
    with EsGuest(host) as guest:
        rows = guest.system.supported_cpuid()
        guest.vcpu.set_cpuid2(rows)
        guest.run()
        guest.vcpu.set_cpuid2(rows)
        with pytest.raises(KvmError):
            guest.vcpu.set_cpuid2(rows[:-1])


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
@pytest.mark.parametrize("launched", [False, True])
def test_type_3_has_no_registers_in_kvm_run(host: ModelHost, field: str, launched: bool) -> None:
    with EsGuest(host) as guest:
        if launched:
            guest.launch()
        setattr(guest.vcpu.kvm_run, field, kvm.KVM_SYNC_X86_REGS)
        assert raw(guest.vcpu, ioctls.KVM_RUN, 0) == EINVAL
        setattr(guest.vcpu.kvm_run, field, 0)
        guest.vcpu.request_exit()
        assert guest.run() == Intr()


def test_the_legacy_type_takes_registers_from_kvm_run_and_gives_none(host: ModelHost) -> None:
    with EsGuest(host, PLAIN) as guest:
        set_up(guest)
        guest.launch()
        launched = model_vmsa.of(guest.file())
        run = guest.vcpu.kvm_run
        run.s.regs.regs = v.kvm_regs(rax=0x55, rip=0x7000, rflags=2)
        run.s.regs.sregs = guest.vcpu.get_sregs()
        run.s.regs.sregs.cr3, run.s.regs.sregs.cr4, run.s.regs.sregs.cr8 = 0x9000, 0x20, 3
        run.kvm_dirty_regs, run.kvm_valid_regs = kvm.KVM_SYNC_X86_REGS | kvm.KVM_SYNC_X86_SREGS, 7
        guest.vcpu.request_exit()
        assert guest.run() == Intr()
        assert run.kvm_dirty_regs == 0 and (guest.vcpu.get_regs().rax, guest.vcpu.get_regs().rip) == (0x55, 0x7000)
        assert bytes(run.s.regs.regs) == bytes(v.kvm_regs(rax=0x55, rip=0x7000, rflags=2)), "as user space left it"
        assert run.s.regs.sregs.cr3 == 0x9000, "nothing is given back"
        assert (guest.vcpu.get_sregs().cr4, run.cr8) == (0x620, 0), "and of system registers nothing was taken"
        run.s.regs.sregs.efer, run.kvm_dirty_regs = 0x100, kvm.KVM_SYNC_X86_SREGS
        assert raw(guest.vcpu, ioctls.KVM_RUN, 0) == EINVAL and run.kvm_dirty_regs == kvm.KVM_SYNC_X86_SREGS
        assert difference(model_vmsa.of(guest.file()), launched) is None


# ---- what goes on as ever
@BOTH
def test_what_is_kvms_own_still_works(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        guest.launch()
        vcpu = guest.vcpu
        vcpu.nmi()
        assert vcpu.get_vcpu_events().nmi.pending == 1
        events = vcpu.get_vcpu_events()
        events.nmi.pending, events.flags = 0, kvm.KVM_VCPUEVENT_VALID_NMI_PENDING
        vcpu.set_vcpu_events(events)
        assert vcpu.get_vcpu_events().nmi.pending == 0
        vcpu.interrupt(0x30)
        assert vcpu.get_vcpu_events().interrupt.nr == 0x30
        vcpu.set_mp_state(vcpu.get_mp_state())
        assert vcpu.ioctl_raw(ioctls.KVM_GET_TSC_KHZ) > 0
        assert vcpu.pre_fault(0, 4096) == (4096, 0)


@BOTH
def test_init_and_sipi_do_not_reach_the_guests_registers(host: ModelHost, type: int) -> None:
    with EsGuest(host, type, vcpus=2, irqchip=True) as guest:
        set_up(guest, 1)
        guest.launch()
        launched = model_vmsa.of(guest.file(1))
        second, activity = guest.vcpus[1], guest.file(1).activity
        assert second.get_mp_state() == kvm.KVM_MP_STATE_UNINITIALIZED
        activity.init()
        assert second.get_mp_state() == kvm.KVM_MP_STATE_INIT_RECEIVED
        activity.sipi(0x9A)
        assert second.get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE
        assert difference(model_vmsa.of(guest.file(1)), launched) is None
        if type == PLAIN:
            assert (second.get_regs().rip, second.get_sregs().cr0) == (0xFFF0, 0x10), "KVM's copy was reset, and not started"
        assert len(bytes(second.get_lapic())) == 1024


def test_an_ioctl_that_waited_for_the_launch_is_refused(host: ModelHost) -> None:
    """It came before LAUNCH_UPDATE_VMSA and got the vCPU only after it."""
    with EsGuest(host) as guest:
        file, room, answers = guest.file(), v.kvm_regs(), []
        with file.mutex:
            asker = threading.Thread(target=lambda: answers.append(raw(guest.vcpu, ioctls.KVM_GET_REGS, room)))
            asker.start()
            asker.join(0.05)
            assert asker.is_alive()
            launched.protect(file)
        asker.join(10)
        assert answers == [EINVAL] and not any(bytes(room))


def test_nothing_shows_the_registers(host: ModelHost) -> None:
    with EsGuest(host) as guest:
        regs, _ = set_up(guest)
        guest.launch()
        protected = guest.file().protected
        assert protected is not None
        with protected.kvms_own():
            shown = f"{protected!r} {protected._own!r} {guest.file()!r}"
        spelled = (f"{regs.r8:x}", str(regs.r8), repr(struct.pack("<Q", regs.r8))[2:-1])
        assert not any(words in shown for words in spelled)


# ---- the guest moves to another VM
@BOTH
def test_registers_move_with_the_guest(host: ModelHost, type: int) -> None:
    with EsGuest(host, type, vcpus=2) as guest, Machine(host, type) as other:
        for number in range(2):
            set_up(guest, number, rip=0x100000 + number)
            guest.vcpus[number].set_msrs({LSTAR: 0x1234000 + number})
            fpu = guest.vcpus[number].get_fpu()
            fpu.fcw = 0x270 + number
            guest.vcpus[number].set_fpu(fpu)
        guest.launch()
        launched = [model_vmsa.of(guest.file(number)) for number in range(2)]
        for number in range(2):
            other.add_vcpu().set_regs(v.kvm_regs(rax=0xAA00 + number, rip=0x10, rflags=2))
        own = bytes(other.vcpu.get_fpu())
        other.vm.enable_cap(caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, guest.vm.fd)
        moved: Any = [host.file(vcpu.fd) for vcpu in other.vcpus]
        assert [model_vmsa.of(file) for file in moved] == launched and all(file.protected for file in moved)
        assert raw(guest.vcpu, ioctls.KVM_GET_REGS, v.kvm_regs()) == EIO
        assert bytes(other.vcpu.get_fpu()) == own, "KVM forgets to make this confidential; it is not the guest's"
        fpu = other.vcpu.get_fpu()
        fpu.fcw = 0x27F
        other.vcpu.set_fpu(fpu)
        assert other.vcpu.get_fpu().fcw == 0x27F and [model_vmsa.of(file) for file in moved] == launched
        if type == PLAIN:
            assert [vcpu.get_regs().rax for vcpu in other.vcpus] == [0xAA00, 0xAA01], "KVM's own copy stays"
        else:
            assert raw(other.vcpu, ioctls.KVM_GET_REGS, v.kvm_regs()) == EINVAL


@pytest.mark.parametrize(("type", "features", "status"), [(2, 0, 0b1), (SEV_ES, 0, 0b11), (SEV_ES, 1 << 5, 0b1000_0011)])
def test_sev_status_in_the_guest(type: int, features: int, status: int) -> None:
    host = ModelHost(Platform(debug_swap=True))
    with Machine(host, type) as guest:
        guest.vm.sev_op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(vmsa_features=features))
        guest.add_vcpu()
        file: Any = host.file(guest.vcpu.fd)
        assert file.cpu.msrs.sev_status == status
