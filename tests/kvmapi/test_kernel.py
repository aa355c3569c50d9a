"""The objects over the real /dev/kvm: a VM of type 0 that runs a few instructions of real mode."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from errno import EBADF, EINTR, EINVAL, ENOENT, ENOTTY

import pytest

from kvmapi.abi import caps, ioctls, kvm, sev
from kvmapi.abi.structs import kvm_userspace_memory_region
from kvmapi.errors import HostError, KvmError
from kvmapi.exits import Hlt, Intr, Io
from kvmapi.host import Host
from kvmapi.kernel import KernelHost
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from kvmapi.vcpu import Vcpu
from kvmapi.vm import MsrRange, Vm

CODE_GPA = 0x1000


@pytest.fixture
def system() -> Iterator[System]:
    try:
        with System(KernelHost()) as opened:
            yield opened
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def vm(system: System) -> Iterator[Vm]:
    with system.create_vm() as made:
        yield made


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 0x4000) as made:
        yield made


def boot(vm: Vm, memory: mmap.mmap, code: str) -> Vcpu:
    """Real-mode `code` (hex) at GPA 0x1000."""
    text = bytes.fromhex(code)
    memory[: len(text)] = text
    vm.set_user_memory_region(0, CODE_GPA, len(memory), address(memory))
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = CODE_GPA, 2
    vcpu.set_regs(regs)
    return vcpu


def address(memory: mmap.mmap) -> int:
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    return ctypes.addressof(view)


def test_kernel_host_is_a_host() -> None:
    assert isinstance(KernelHost(), Host)


def test_system_answers(system: System) -> None:
    assert system.api_version() == kvm.KVM_API_VERSION
    assert system.vcpu_mmap_size() >= 8192
    assert system.check_extension(caps.KVM_CAP_USER_MEMORY) == 1
    assert {entry.function for entry in system.supported_cpuid()} >= {0, 1, 0x80000000}
    assert 0x10 in system.msr_index_list()
    assert system.check_extension(caps.KVM_CAP_NR_MEMSLOTS) in (509, kvm.KVM_USER_MEM_SLOTS)
    assert isinstance(system.has_device_attr(sev.KVM_X86_GRP_SEV, sev.KVM_X86_SEV_VMSA_FEATURES), bool)


def test_a_guest_runs_and_exits(vm: Vm, memory: mmap.mmap) -> None:
    # mov al,'A'; out 0x10,al; in al,0x11; out 0x10,al; hlt
    with boot(vm, memory, "b041 e610 e411 e610 f4") as vcpu:
        assert vcpu.run() == 0
        assert vcpu.exit() == Io(0x10, 1, 1, True, b"A", kvm.PAGE_SIZE * kvm.KVM_PIO_PAGE_OFFSET)
        assert vcpu.run() == 0
        asked = vcpu.exit()
        assert isinstance(asked, Io) and (asked.port, asked.is_out) == (0x11, False)
        vcpu.answer_io(asked, b"Z")
        assert vcpu.run() == 0
        told = vcpu.exit()
        assert isinstance(told, Io) and told.data == b"Z"
        assert vcpu.run() == 0 and vcpu.exit() == Hlt()
        assert vcpu.get_regs().rip == CODE_GPA + 9


def test_immediate_exit_is_intr(vm: Vm, memory: mmap.mmap) -> None:
    with boot(vm, memory, "ebfe") as vcpu:
        vcpu.request_exit()
        assert vcpu.run() == EINTR and vcpu.exit(EINTR) == Intr()


def test_running_lets_other_threads_run(vm: Vm, memory: mmap.mmap) -> None:
    # in al,0x12; test al,al; jz to the start; hlt: spins in the guest on memory at 0x3000 instead of exiting
    # mov al,[0x3000]; test al,al; jz -7; hlt
    with boot(vm, memory, "a00030 84c0 74f9 f4") as vcpu:
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(vcpu.run()))
        thread.start()
        deadline = time.monotonic() + 20
        memory[0x2000] = 1  # only this thread, running beside the guest, can end the loop
        thread.join(timeout=deadline - time.monotonic())
        assert not thread.is_alive() and results == [0] and vcpu.exit() == Hlt()


def test_registers_msrs_and_cpuid(system: System, vm: Vm) -> None:
    with vm.create_vcpu(3) as vcpu:
        vcpu.set_cpuid2(system.supported_cpuid())
        vcpu.set_msrs({0x174: 0x10, 0x175: 0xFFFF})
        assert vcpu.get_msrs([0x174, 0x175]) == {0x174: 0x10, 0x175: 0xFFFF}
        with pytest.raises(KvmError, match="0x40000fff") as caught:
            vcpu.get_msrs([0x174, 0x40000FFF])
        assert caught.value.arguments["done"] == 1
        assert vcpu.get_debugregs().dr7 == 0x400
        assert vcpu.get_mp_state() == kvm.KVM_MP_STATE_RUNNABLE
        assert vcpu.translate(0x1234) == 0x1234
        assert vcpu.id == 3


def test_errors_come_with_words_or_raw(system: System, vm: Vm) -> None:
    with pytest.raises(KvmError) as caught:
        vm.set_user_memory_region(1, 0x1000, 0x800, 0x1000)
    assert caught.value.errno == EINVAL and caught.value.arguments["memory_size"] == 0x800
    bad = kvm_userspace_memory_region(1, 0, 0x1000, 0x800, 0x1000)
    assert vm.ioctl_raw(ioctls.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(bad)) == -EINVAL
    assert vm.ioctl_raw(ioctls.KVM_RUN) == -ENOTTY
    with pytest.raises(KvmError, match="knows no such ioctl"):
        vm.ioctl(ioctls.KVM_RUN)
    with pytest.raises(KvmError, match="type 31"):
        system.create_vm(31)


def test_sev_is_refused_in_words_on_a_plain_vm(vm: Vm) -> None:
    with pytest.raises(KvmError) as caught:
        vm.sev_op(sev.KVM_SEV_LAUNCH_FINISH)
    assert caught.value.ioctl == "KVM_SEV_LAUNCH_FINISH" and caught.value.fw_error is None
    assert caught.value.errno == ENOTTY and "INIT2" in caught.value.hint


def test_guest_memfd(system: System, vm: Vm) -> None:
    if not vm.check_extension(caps.KVM_CAP_GUEST_MEMFD):
        pytest.skip("the kernel has no guest_memfd for plain VMs; 7.x has")
    with vm.create_guest_memfd(0x4000) as memfd:
        memfd.allocate(0, 0x2000)
        memfd.punch_hole(0x1000, 0x1000)
        with pytest.raises(KvmError, match="multiples of 4 KiB"):
            memfd.punch_hole(1, 0x1000)
        with pytest.raises(KvmError, match="MMAP"):
            memfd.mmap()
    with pytest.raises(KvmError, match="KVM_CREATE_GUEST_MEMFD"):
        vm.create_guest_memfd(0x123)


def test_msr_filter_sends_an_msr_to_user_space(vm: Vm, memory: mmap.mmap) -> None:
    vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, kvm.KVM_MSR_EXIT_REASON_FILTER)
    vm.set_msr_filter([MsrRange(0x40000ABC, 1, b"\0")])
    with pytest.raises(ValueError, match="too short"):
        vm.set_msr_filter([MsrRange(0, 64, b"\0")])
    vm.set_msr_filter([])


def test_closing_is_safe(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    held = vcpu.kvm_run
    vcpu.close()
    vcpu.close()
    assert held.exit_reason == 0  # the page stays mapped while someone holds it
    assert vcpu.ioctl_raw(ioctls.KVM_GET_REGS) == -EBADF and "closed" in repr(vcpu)
    vm.close()
    vm.close()


def test_hosts_raise_as_os_does() -> None:
    host = KernelHost()
    with pytest.raises(HostError, match="modprobe") as caught:
        System(host, "/nonexistent/kvm")
    assert caught.value.errno == ENOENT
    with pytest.raises(HostError):
        SevPlatform(host, "/nonexistent/sev")
    assert host.ioctl(-1, ioctls.KVM_RUN) == -EBADF
    assert host.ioctl(-1, ioctls.KVM_RUN, 1 << 40) == -EBADF
    fd = host.memfd_create("test", 0)
    host.fallocate(fd, 0, 0, 8192)
    with host.mmap(fd, 8192) as view:
        view[0] = 1
    with pytest.raises(OSError, match="length"):
        host.mmap(fd, 1 << 20)
    with pytest.raises(OSError):
        host.fallocate(fd, 0, -1, 1)
    assert os.fstat(fd).st_size == 8192
    host.close(fd)


def test_importing_the_objects_loads_nothing_heavy() -> None:
    code = (
        "import sys, kvmapi.vm, kvmapi.vcpu, kvmapi.system, kvmapi.sev, kvmapi.launch, kvmapi.session\n"
        "print([m for m in ('cryptography', 'unicorn', 'rich', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
