"""Private slots of the UPM dialects on VMs that are no SEV guests: who decides, what exits, what is kept.

The C-bit and encryption are in test_upm_sev.py, the files themselves in test_upm_memfd.py.
"""

from __future__ import annotations

import ctypes
import errno
import random
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import dialects as d
from kvmapi.abi.structs import kvm_userspace_memory_region
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt, Hypercall, Mmio
from tests.conformance.snippets import MIB, PAGE, PDPT, address_of
from tests.model.upm import AT, CLR, ENCRYPTED, MARK, PAT, PAT2, Upm, fault, host, make_private, make_shared

pytestmark = pytest.mark.model
GONE = 0xBAD000


@pytest.fixture(params=["upm-v6", "upm-v7"])
def guest(request: pytest.FixtureRequest) -> Any:
    with Upm(host(request.param)) as made:
        yield made


@pytest.fixture
def v6() -> Any:
    with Upm(host("upm-v6")) as made:
        yield made


# ---- what there is
def test_what_a_kernel_of_then_had(guest: Upm) -> None:
    for cap in (caps.KVM_CAP_GUEST_MEMFD, caps.KVM_CAP_USER_MEMORY2, caps.KVM_CAP_MEMORY_ATTRIBUTES, caps.KVM_CAP_MEMORY_FAULT_INFO):
        assert guest.vm.check_extension(cap) == guest.system.check_extension(cap) == 0
    assert guest.vm.check_extension(d.KVM_CAP_UNMAPPED_PRIVATE_MEM) == 1
    for request in (ioctls.KVM_SET_USER_MEMORY_REGION2, ioctls.KVM_CREATE_GUEST_MEMFD, ioctls.KVM_SET_MEMORY_ATTRIBUTES):
        assert guest.vm.ioctl_raw(request, GONE) == -errno.ENOTTY
    assert guest.vcpu.ioctl_raw(ioctls.KVM_PRE_FAULT_MEMORY, GONE) == -errno.EINVAL
    with pytest.raises(KvmError) as caught:
        guest.system.create_vm(kvm.KVM_X86_SW_PROTECTED_VM)
    assert caught.value.errno == errno.EINVAL


def test_mainline_has_none_of_it() -> None:
    with Upm(host("mainline"), pages=None) as guest:
        assert guest.vm.check_extension(d.KVM_CAP_UNMAPPED_PRIVATE_MEM) == 0
        with pytest.raises(KvmError):
            guest.vm.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM)
        with pytest.raises(KvmError) as caught:
            guest.vm.set_private_region(1, AT, PAGE, guest.hva, 0)
        assert caught.value.errno == errno.EINVAL
        assert isinstance(guest.say(AT, 1, MARK), Hypercall)  # a bit that KVM does not look at


def test_a_dialect_that_nobody_posted() -> None:
    with pytest.raises(ValueError, match="upm-v6, attr-2022"):
        host("upm-v5")


def test_a_machine_without_sev() -> None:
    with Upm(host("upm-v6", sev=False)) as guest:
        guest.fill(PAT)
        guest.memfd.allocate(0, PAGE)
        assert guest.says(AT, 1, MARK) == 0
        assert guest.store(PAT2) == Hlt() and guest.secret() == PAT2 and guest.word() == PAT


# ---- the slot
def ext(guest: Upm, flags: int = d.KVM_MEM_PRIVATE, slot: int = 11, gpa: int = 2 * AT, offset: int = 0, fd: int | None = None) -> int:
    """KVM_SET_USER_MEMORY_REGION of one page: the errno."""
    region = kvm_userspace_memory_region(slot, flags, gpa, PAGE, address_of(guest.shared))
    argument = d.kvm_userspace_memory_region_ext(region, offset, guest.memfd.fd if fd is None else fd)
    result = guest.vm.ioctl_raw(ioctls.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(argument))
    return -result if result < 0 else 0


def test_slots_that_are_refused(guest: Upm) -> None:
    assert ext(guest, offset=1) == errno.EINVAL
    assert ext(guest, offset=(1 << 64) - PAGE) == errno.EINVAL
    assert ext(guest, fd=guest.vm.fd) == errno.EINVAL
    assert ext(guest, fd=999) == errno.EINVAL
    assert ext(guest, flags=d.KVM_MEM_PRIVATE | 8) == errno.EINVAL
    assert ext(guest, slot=10) == errno.EINVAL  # there already: it can only be deleted
    assert ext(guest, slot=0, gpa=0) == errno.EINVAL
    guest.vm.set_user_memory_region(9, 3 * AT, PAGE, address_of(guest.shared))
    assert ext(guest, slot=9, gpa=3 * AT) == errno.EINVAL  # the same, but for the flag
    assert ext(guest, gpa=AT) == errno.EEXIST
    assert ext(guest, offset=1 << 40) == 0  # beyond the file: never there
    assert ext(guest, slot=12, gpa=4 * AT, flags=d.KVM_MEM_PRIVATE | kvm.KVM_MEM_READONLY) == 0


def test_the_short_struct_is_enough_without_the_flag(guest: Upm) -> None:
    tail = guest.mapping(1)
    short = address_of(tail) + PAGE - 32
    region = kvm_userspace_memory_region(13, 0, 3 * AT, PAGE, address_of(guest.shared))
    ctypes.memmove(short, ctypes.addressof(region), 32)
    assert guest.vm.ioctl_raw(ioctls.KVM_SET_USER_MEMORY_REGION, short) == 0
    assert guest.vm.ioctl_raw(ioctls.KVM_SET_USER_MEMORY_REGION, GONE) == -errno.EFAULT


def test_a_private_slot_is_not_changed(guest: Upm) -> None:
    for gpa, flags in ((AT, 0), (2 * AT, 0), (AT, kvm.KVM_MEM_LOG_DIRTY_PAGES)):
        with pytest.raises(KvmError) as caught:
            guest.vm.set_user_memory_region(10, gpa, 2 * PAGE, address_of(guest.shared), flags)
        assert caught.value.errno == errno.EINVAL


def test_a_deleted_slot_is_mmio(guest: Upm) -> None:
    make_private(guest)
    guest.vm.set_user_memory_region(10, AT, 0, 0)
    assert isinstance(guest.load(), Mmio)


# ---- v6
def test_population_decides(v6: Upm) -> None:
    v6.fill(PAT)
    assert v6.value() == PAT  # a hole: shared
    v6.memfd.allocate(0, PAGE)
    assert v6.load() == fault(False)  # nothing marked: a shared access, page by page
    assert v6.value(AT + PAGE) == PAT
    v6.memfd.punch_hole(0, PAGE)
    assert v6.run() == Hlt() and v6.regs().rax == PAT
    assert v6.says(AT, 2, MARK) == 0
    assert v6.store(PAT2) == fault(True)
    v6.memfd.allocate(0, PAGE)
    assert v6.run() == Hlt()
    assert v6.word() == PAT and v6.value() == PAT2 and v6.secret() == PAT2
    assert v6.load(AT + PAGE + 8) == fault(True, AT + PAGE)


def test_the_exit_as_it_stands_in_kvm_run(v6: Upm) -> None:
    v6.memfd.allocate(0, 2 * PAGE)
    v6.regs(rip=0x10000, rbx=AT + PAGE + 0x123)
    assert v6.vcpu.ioctl_raw(ioctls.KVM_RUN) == 0
    run = bytes(v6.vcpu.run_map[:64])
    assert int.from_bytes(run[8:12], "little") == 36
    assert run[32:40] == bytes(8) and int.from_bytes(run[40:48], "little") == AT + PAGE and int.from_bytes(run[48:56], "little") == PAGE
    assert v6.says(AT, 2, MARK) == 0
    v6.memfd.punch_hole(0, PAGE)
    assert v6.load() == fault(True)
    assert bytes(v6.vcpu.run_map[32:40]) == (1).to_bytes(8, "little")


def test_one_range_per_vcpu() -> None:
    with Upm(host("upm-v6"), vcpus=2, pages=4) as guest:
        guest.fill(PAT)
        assert guest.says(AT, 4, MARK) == 0
        assert guest.load(vcpu=0) == fault(True)
        assert guest.value(vcpu=1) == PAT  # the other's accesses are shared
        guest.memfd.allocate(0, 4 * PAGE)
        assert guest.value(vcpu=0) == 0
        assert guest.load(vcpu=1) == fault(False)
        assert guest.says(AT, 4, MARK, vcpu=1) == 0
        assert guest.store(PAT2, vcpu=0) == Hlt() and guest.value(vcpu=1) == PAT2
        assert guest.says(AT + PAGE, 1, MARK, vcpu=1) == 0  # a new range instead of the old one
        assert guest.load(vcpu=1) == fault(False)
        assert guest.value(AT + PAGE, vcpu=1) == 0
        assert guest.says(AT + PAGE, 1, CLR, vcpu=0) == 0
        assert guest.load(AT + PAGE, vcpu=0) == fault(False, AT + PAGE)
        assert guest.value(AT, vcpu=0) == PAT2 and guest.value(AT + 2 * PAGE, vcpu=0) == 0
        assert guest.says(0, 0, MARK) == 0  # none at all
        assert guest.load(AT + 2 * PAGE) == fault(False, AT + 2 * PAGE)


def test_tables_that_only_one_vcpu_may_use() -> None:
    """A table in memory that one vCPU marked private and the other did not."""
    with Upm(host("upm-v6"), vcpus=2) as guest:
        guest.put(PDPT + 16, (AT | 3).to_bytes(8, "little"))  # the third GiB is mapped by the test slot
        guest.memfd.allocate(0, PAGE)
        assert guest.says(AT, 1, MARK, vcpu=1) == 0
        assert guest.store(0x83, AT, vcpu=1) == Hlt()
        guest.put(0x100000, PAT.to_bytes(8, "little"))
        assert guest.value((2 << 30) + 0x100000, vcpu=1) == PAT
        assert guest.load((2 << 30) + 0x100000, vcpu=0) == fault(False)


@pytest.mark.parametrize(
    ("gpa", "pages", "attributes", "result"),
    [
        (AT + 1, 1, MARK, -errno.EINVAL),
        (AT, (1 << 64) - 1, MARK, -errno.EINVAL),
        (AT, 0, ENCRYPTED, -errno.EINVAL),
        (1 << 51, 1 << 60, MARK, 0),
    ],
)
def test_marks_that_mean_nothing(v6: Upm, gpa: int, pages: int, attributes: int, result: int) -> None:
    assert v6.says(gpa, pages, attributes) == result


def test_marks_need_the_capability(guest: Upm) -> None:
    guest.vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 0)
    assert guest.says(AT, 1, MARK) == -kvm.KVM_ENOSYS


# ---- both
def test_conversions_there_and_back(guest: Upm) -> None:
    guest.fill(PAT)
    for number in range(3):
        make_private(guest, 0, 2)
        assert guest.says(AT, 2, MARK) == 0
        assert guest.value(AT + PAGE) == (PAT if guest.dialect == "upm-v7" and not number else 0)
        assert guest.store(number, AT + PAGE) == Hlt()
        assert guest.value(AT + PAGE) == number
        assert guest.says(AT, 2, CLR) == 0
        assert guest.load(AT + PAGE) == fault(False, AT + PAGE)
        make_shared(guest, 0, 2)
        assert guest.value(AT + PAGE) == PAT
    assert guest.word(PAGE) == PAT


def test_a_file_of_two_vms(guest: Upm) -> None:
    with Upm(guest.model, pages=None) as other:
        other.shared, other.memfd = other.mapping(2), guest.memfd
        other.vm.set_private_region(10, AT, 2 * PAGE, address_of(other.shared), guest.memfd.fd)
        for one in (guest, other):
            assert one.value(0x100000) == 0
            if one.dialect == "upm-v7":
                one.vm.register_private(AT, 2 * PAGE)
            assert one.says(AT, 2, MARK) == 0
        guest.memfd.allocate(0, PAGE)
        assert guest.store(PAT) == Hlt()
        assert other.value() == PAT
        guest.memfd.punch_hole(0, PAGE)
        assert other.load() == (fault(True) if guest.dialect == "upm-v6" else Hlt())
        assert guest.dialect == "upm-v6" or other.regs().rax == 0


def test_the_dirty_log_has_private_pages_too(guest: Upm) -> None:
    memory = guest.mapping(4)
    file = guest.file(4 * PAGE)
    guest.vm.set_private_region(12, 2 * AT, 4 * PAGE, address_of(memory), file.fd, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)
    assert guest.value(0x100000) == 0
    file.allocate(0, 4 * PAGE)
    if guest.dialect == "upm-v7":
        guest.vm.register_private(2 * AT, 4 * PAGE)
    assert guest.says(2 * AT, 4, MARK) == 0
    assert guest.store(PAT, 2 * AT) == Hlt() and guest.vm.get_dirty_log(12, 4)[0] == 1  # the guest's table is dirty now
    assert guest.value(2 * AT + PAGE) == guest.value(2 * AT + 2 * PAGE) == 0
    assert guest.store(PAT, 2 * AT + 2 * PAGE) == Hlt()
    assert guest.vm.get_dirty_log(12, 4)[0] == 4
    assert guest.store(PAT, 2 * AT + 2 * PAGE) == Hlt()
    assert guest.vm.get_dirty_log(12, 4)[0] == 4


def test_a_read_only_private_slot(guest: Upm) -> None:
    memory, file = guest.mapping(1), guest.file(PAGE)
    guest.vm.set_private_region(12, 2 * AT, PAGE, address_of(memory), file.fd, flags=kvm.KVM_MEM_READONLY)
    assert guest.value(0x100000) == 0
    file.allocate(0, PAGE)
    if guest.dialect == "upm-v7":
        guest.vm.register_private(2 * AT, PAGE)
    assert guest.says(2 * AT, 1, MARK) == 0
    assert guest.value(2 * AT) == 0
    assert isinstance(guest.store(PAT, 2 * AT), Mmio)


@pytest.mark.parametrize("dialect", ["upm-v6", "upm-v7"])
def test_at_random(dialect: str, no_leaks: None) -> None:
    """Against the rule written down once more, over pages that two vCPUs use."""
    pages, dice = 4, random.Random(6)
    with Upm(host(dialect), pages=pages, vcpus=2) as guest:
        assert guest.value(0x100000) == 0
        page_private = [False] * pages
        marked = [[False] * pages for _ in range(2)] if dialect == "upm-v6" else [[True] * pages] * 2
        content: dict[tuple[bool, int], int] = {}
        for step in range(400):
            vcpu, page, what = dice.randrange(2), dice.randrange(pages), dice.randrange(6)
            count = dice.randrange(1, pages - page + 1)
            touched = range(page, page + count)
            if what == 0:
                make_private(guest, page, count)
                for at in touched:
                    page_private[at] = True
            elif what == 1:
                make_shared(guest, page, count)
                for at in touched:
                    page_private[at] = False
                    content.pop((True, at), None)
            elif what == 2:
                mark = dice.random() < 0.7
                assert guest.says(AT + page * PAGE, count, MARK if mark else CLR, vcpu) == 0
                if dialect == "upm-v6" and mark:
                    marked[vcpu][:] = [False] * pages
                for at in touched:
                    marked[vcpu][at] = mark
            else:
                private = marked[vcpu][page]
                va = AT + page * PAGE
                if private != page_private[page]:
                    assert guest.load(va, vcpu) == fault(private, va)
                elif what == 3:
                    assert guest.store(step, va, vcpu) == Hlt()
                    content[private, page] = step
                else:
                    assert guest.value(va, vcpu) == content.get((private, page), 0)
            for at in range(pages):
                assert guest.word(at * PAGE) == content.get((False, at), 0)


def test_addresses_without_memory_cost_nothing(v6: Upm) -> None:
    """Ranges that are no memory leave no trace, however many of them a guest names."""
    vm: Any = v6.model.file(v6.vm.fd)
    assert v6.says(0, 1 << 52, MARK) == 0
    for number in range(64):
        assert v6.says((number << 36) + MIB * 64, 1, CLR) == 0
    assert not any(entry.cleared._partial for entry in vm.rule._ranges.values())
