"""The interfaces under the RFC suite, in the dialects upm-v6 and upm-v7: inaccessible memfds, private memslots, regions, the exit as it is
in kvm_run, and what the eight cases of `sev_priv_memfd` take for granted.
"""

from __future__ import annotations

import os
from contextlib import closing
from errno import EBADF, EINVAL, EPERM

from kvmapi.abi import dialects as d
from kvmapi.abi.run import EXIT_UNION_OFFSET
from kvmapi.dialects import PrivateMemfd, Vm
from kvmapi.host import Host
from vmm.selftests.api import Case, Subtest, check_equal, expect_errno, runs_on
from vmm.selftests.privmem.beyond import ANSWERED, BEGINS, CLEARED, FORGETS, TAKEN
from vmm.selftests.privmem.cases import SCENARIOS, Scenario
from vmm.selftests.privmem.guest import TEST_GPA
from vmm.selftests.privmem.runs import make_rig, run_once
from vmm.selftests.privmem.shared import SharedMemory

UPM = ("upm-v6", "upm-v7")
PAGE = 0x1000

everywhere = runs_on("plain", "sev", "sev-es", dialects=UPM)
on_plain = runs_on("plain", dialects=UPM)


@on_plain
def test_inaccessible_memfd(host: Host, subtest: Subtest) -> None:
    """MFD_INACCESSIBLE: a size once, and no view of the contents for anybody."""
    flags = os.MFD_CLOEXEC | d.MFD_INACCESSIBLE
    with subtest("cannot be sealed by others"), expect_errno(EINVAL):
        host.close(host.memfd_create("x", flags | d.MFD_ALLOW_SEALING))
    with subtest("size in whole pages"), expect_errno(EINVAL):
        PrivateMemfd.create(host, PAGE + 1).allocate(0, PAGE)
    with closing(PrivateMemfd.create(host, 4 * PAGE)) as memfd:
        with subtest("one size"), expect_errno(EPERM):
            memfd.resize(8 * PAGE)
        with subtest("nothing beyond the size"), expect_errno(EPERM):
            memfd.allocate(4 * PAGE, PAGE)
        with subtest("mmap"), expect_errno(EPERM):
            host.mmap(memfd.fd, PAGE)
        with subtest("write"), expect_errno(EPERM):
            os.pwrite(memfd.fd, b"x", 0)
        with subtest("read"), expect_errno(EPERM, EBADF):
            os.pread(memfd.fd, 1, 0)
        for offset, length in ((1, PAGE), (0, PAGE + 1)):
            with subtest(f"a hole of [{offset:#x}, {offset + length:#x})"), expect_errno(EINVAL):
                memfd.punch_hole(offset, length)


@everywhere
def test_private_slot(vm: Vm, host: Host, subtest: Subtest) -> None:
    """kvm_userspace_memory_region_ext: what is refused, and that a slot can be made and deleted, not changed."""
    with closing(PrivateMemfd.create(host, 2 * PAGE)) as memfd, closing(SharedMemory(2 * PAGE)) as shared:
        wrong = {
            "an offset inside a page": (memfd.fd, 8),
            "an offset whose end wraps": (memfd.fd, (1 << 64) - PAGE),
            "no open fd": (0x7FFF, 0),
            "an fd of something else": (vm.fd, 0),
        }
        for name, (fd, offset) in wrong.items():
            with subtest(name), expect_errno(EINVAL):
                vm.set_private_region(1, 0, PAGE, shared.address, fd, offset)
        vm.set_private_region(1, 0, 2 * PAGE, shared.address, memfd.fd)
        with subtest("moving it"), expect_errno(EINVAL):
            vm.set_private_region(1, 4 * PAGE, 2 * PAGE, shared.address, memfd.fd)
        with subtest("an ordinary slot in its place"), expect_errno(EINVAL):
            vm.set_user_memory_region(1, 4 * PAGE, 2 * PAGE, shared.address)
        with subtest("deleting it, and making it elsewhere"):
            vm.set_user_memory_region(1, 0, 0, shared.address)
            vm.set_private_region(1, 4 * PAGE, PAGE, shared.address, memfd.fd, PAGE)


@runs_on("plain", "sev", "sev-es", dialects=("upm-v7",))
def test_regions(vm: Vm, host: Host, subtest: Subtest) -> None:
    """KVM_MEMORY_ENCRYPT_REG_REGION of GPAs: whole pages that do not wrap, as often as one likes."""
    for gpa, size in ((0, 0), (1, PAGE), (PAGE, 1), ((1 << 64) - PAGE, 2 * PAGE), (PAGE, PAGE + 8)):
        for call in (vm.register_private, vm.unregister_private):
            with subtest(f"{call.__name__}({gpa:#x}, {size:#x})"), expect_errno(EINVAL):
                call(gpa, size)
    with closing(PrivateMemfd.create(host, 2 * PAGE)) as memfd, closing(SharedMemory(2 * PAGE)) as shared:
        vm.set_private_region(1, 0, 2 * PAGE, shared.address, memfd.fd)
        with subtest("twice is as good as once"):
            for call in (vm.unregister_private, vm.register_private, vm.register_private, vm.unregister_private, vm.unregister_private):
                call(0, 2 * PAGE)


@everywhere
def test_capability(vm: Vm) -> None:
    """KVM_CAP_UNMAPPED_PRIVATE_MEM is there, and takes no flags; attributes of later kernels are not."""
    check_equal(vm.check_extension(d.KVM_CAP_UNMAPPED_PRIVATE_MEM), 1, "KVM_CAP_UNMAPPED_PRIVATE_MEM")
    with expect_errno(EINVAL):
        vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM, flags=1)
    check_equal(vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM), 0, "enabling it")


def _raw_exit(scenario: Scenario, case: Case, host: Host, prepare: bool, flags: int) -> None:
    """The first memory fault of a case, word by word."""
    with make_rig(scenario, case, host) as rig:
        rig.sync(0)
        if prepare:
            rig.make_all_shared()
        vcpu = rig.vcpus[0]
        check_equal(vcpu.run(), 0, "KVM_RUN")
        check_equal(vcpu.kvm_run.exit_reason, 36, "kvm_run.exit_reason")
        words = [int.from_bytes(vcpu.run_map[EXIT_UNION_OFFSET + at : EXIT_UNION_OFFSET + at + 8], "little") for at in (0, 8, 16)]
        check_equal(words, [flags, TEST_GPA, PAGE], "kvm_run.memory (flags and padding, gpa, size)")


@everywhere
def test_memory_fault_exit(case: Case, host: Host, subtest: Subtest) -> None:
    """KVM_RUN returns 0, exit_reason is 36, bit 0 of 32-bit flags says that the access was private."""
    with subtest("shared access of a private page"):
        _raw_exit(SCENARIOS[1], case, host, prepare=False, flags=0)
    with subtest("private access of a shared page"):
        _raw_exit(SCENARIOS[3], case, host, prepare=True, flags=1)


@everywhere
def test_hypercall_answers(case: Case, host: Host) -> None:
    """MARK and CLR: who is refused with EINVAL, and that none of it reaches user space."""
    run_once(ANSWERED, case, host)


@everywhere
def test_cleared_in_part(case: Case, host: Host) -> None:
    """CLR takes one page out of a marked range."""
    run_once(CLEARED, case, host)


@everywhere
def test_punched_memory_forgets(case: Case, host: Host) -> None:
    """Private memory that was given back and taken again does not hold what it held."""
    run_once(FORGETS, case, host)


@everywhere
def test_taken_away(case: Case, host: Host) -> None:
    """The host converts pages that the guest has mapped: its next access faults."""
    run_once(TAKEN, case, host)


@on_plain
def test_what_private_memory_begins_with(case: Case, host: Host) -> None:
    """Zeroes; in upm-v7 what the shared half holds, for regions registered before the first KVM_RUN."""
    run_once(BEGINS, case, host)
