"""guest_memfd_test: what user space can do with a guest_memfd, for each set of flags and on every VM type.

The three body tests are one test with other flags, as in the kernel's file: none (the file is only ever the guest's), MMAP (mapped, but
private: touching it is SIGBUS) and MMAP with INIT_SHARED (mapped, and shared with the guest).
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from errno import EINVAL, ENODEV
from typing import Protocol

from kvmapi.abi import caps, kvm
from kvmapi.host import Host
from kvmapi.kernel import KernelHost
from kvmapi.memfd import GuestMemfd
from kvmapi.vm import Vm
from vmm.selftests import hostmem
from vmm.selftests.api import Bench, MachineFactory, Subtest, check_equal, expect_errno, runs_on, signal_of, skip

PAGE = 4096
SIZE = 4 * PAGE
MMAP, SHARED = kvm.GUEST_MEMFD_FLAG_MMAP, kvm.GUEST_MEMFD_FLAG_INIT_SHARED
KEEP, PUNCH = 1, 2
INT64_MAX = (1 << 63) - 1
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ALL_TYPES = ("plain", "sw-protected", "sev", "sev-es")

Part = Callable[[Vm, int], None]


class View(Protocol):
    """A mapping: `mmap.mmap`, or `hostmem.Overlong` where Python's refuses the length."""

    def __getitem__(self, where: slice, /) -> bytes: ...
    def __setitem__(self, where: slice, data: bytes, /) -> None: ...
    def close(self) -> None:
        """Unmap."""


def flags_of(vm: Vm) -> int:
    """The flags this VM's guest_memfds may have."""
    if not vm.check_extension(caps.KVM_CAP_GUEST_MEMFD):
        skip("this KVM has no guest_memfd (KVM_CAP_GUEST_MEMFD = 0); use a kernel from 6.8 on, or --on model")
    return vm.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS)


@runs_on(*ALL_TYPES)
def test_guest_memfd_flags(vm: Vm, subtest: Subtest) -> None:
    """Every single flag: taken where KVM_CAP_GUEST_MEMFD_FLAGS names it, EINVAL where not."""
    valid = flags_of(vm)
    for bit in range(64):
        with subtest(f"flag bit {bit}"):
            if valid >> bit & 1:
                vm.create_guest_memfd(PAGE, 1 << bit).close()
            else:
                with expect_errno(EINVAL):
                    vm.create_guest_memfd(PAGE, 1 << bit).close()


@runs_on(*ALL_TYPES)
def test_guest_memfd(vm: Vm, subtest: Subtest) -> None:
    """Without flags: size and punching work, reading, writing and mapping do not."""
    flags_of(vm)
    with subtest("create_guest_memfd_multiple"):
        create_guest_memfd_multiple(vm)
    with subtest("create_guest_memfd_invalid_sizes"):
        create_guest_memfd_invalid_sizes(vm, 0)
    run(vm, 0, subtest, [mmap_not_supported])


@runs_on(*ALL_TYPES)
def test_guest_memfd_mmap(vm: Vm, subtest: Subtest) -> None:
    """With MMAP alone: it can be mapped, and every touch of the mapping is SIGBUS."""
    if not flags_of(vm) & MMAP:
        skip("no guest_memfd of this VM type can be mapped (KVM_CAP_GUEST_MEMFD_FLAGS lacks MMAP); use a kernel from 6.18 on")
    with subtest("create_guest_memfd_invalid_sizes"):
        create_guest_memfd_invalid_sizes(vm, MMAP)
    run(vm, MMAP, subtest, [mmap_cow, mbind, fault_private])


@runs_on(*ALL_TYPES)
def test_guest_memfd_init_shared(vm: Vm, subtest: Subtest) -> None:
    """With MMAP and INIT_SHARED: it can be mapped, read and written, up to its end."""
    if not flags_of(vm) & SHARED:
        skip("guest_memfds of this VM type start private (KVM_CAP_GUEST_MEMFD_FLAGS lacks INIT_SHARED)")
    with subtest("create_guest_memfd_invalid_sizes"):
        create_guest_memfd_invalid_sizes(vm, MMAP | SHARED)
    run(vm, MMAP | SHARED, subtest, [mmap_cow, mbind, mmap_supported, fault_overflow, numa_allocation, collapse])


def run(vm: Vm, flags: int, subtest: Subtest, more: list[Part]) -> None:
    """The parts that every guest_memfd passes, and `more`; each on a new file."""
    for part in [file_read_write, *more, file_size, fallocate, invalid_punch_hole, invalid_binding]:
        with subtest(part.__name__):
            part(vm, flags)


# ---- making files
def create_guest_memfd_multiple(vm: Vm) -> None:
    """Two files of one VM are two files."""
    with vm.create_guest_memfd(PAGE) as first:
        before = os.fstat(first.fd)
        assert before.st_size == PAGE
        with vm.create_guest_memfd(2 * PAGE) as second:
            other, again = os.fstat(second.fd), os.fstat(first.fd)
            assert other.st_size == 2 * PAGE and again.st_size == PAGE
            assert again.st_ino != other.st_ino and again.st_ino == before.st_ino


def create_guest_memfd_invalid_sizes(vm: Vm, flags: int) -> None:
    """No size that is not whole pages."""
    for size in range(1, PAGE):
        with expect_errno(EINVAL):
            vm.create_guest_memfd(size, flags).close()


# ---- the parts
def file_read_write(vm: Vm, flags: int) -> None:
    """The fd neither gives nor takes data."""
    with vm.create_guest_memfd(SIZE, flags) as memfd:
        fd, data = memfd.fd, bytes(64)
        calls: list[Callable[[], object]] = [
            lambda: os.read(fd, 64), lambda: os.write(fd, data), lambda: os.pread(fd, 64, 0), lambda: os.pwrite(fd, data, 0),
        ]  # fmt: skip
        for call in calls:
            try:
                call()
            except OSError:
                continue
            raise AssertionError("a guest_memfd was read or written through its fd")


def mmap_not_supported(vm: Vm, flags: int) -> None:
    """Without MMAP there is no mapping, of a page or of all."""
    with vm.create_guest_memfd(SIZE, flags) as memfd:
        for length in (PAGE, SIZE):
            with expect_errno(ENODEV):
                memfd.mmap(length)


def mmap_cow(vm: Vm, flags: int) -> None:
    """A private (copy-on-write) mapping is refused."""
    with vm.create_guest_memfd(SIZE, flags) as memfd, expect_errno(EINVAL):
        vm.host.mmap(memfd.fd, SIZE, READ_WRITE, mmap.MAP_PRIVATE)


def mbind(vm: Vm, flags: int) -> None:
    """A NUMA policy of a mapping can be set and is read back; an unknown one is refused. On the nodes there are, be it one."""
    nodes = hostmem.nodes()
    with vm.create_guest_memfd(SIZE, flags) as memfd, memfd.mmap() as view:
        address = hostmem.address_of(view)
        for mode, wanted in ((hostmem.MPOL_INTERLEAVE, nodes[:2]), (hostmem.MPOL_BIND, nodes[:1]), (hostmem.MPOL_DEFAULT, [])):
            hostmem.mbind(address, SIZE, mode, wanted)
            check_equal(hostmem.get_mempolicy(address), (mode, wanted), "what get_mempolicy() says after mbind()")
        with expect_errno(EINVAL):
            hostmem.mbind(address, SIZE, 999, nodes[:1])


def fault_private(vm: Vm, flags: int) -> None:
    """Private memory can be mapped but not touched."""
    with vm.create_guest_memfd(SIZE, flags) as memfd, memfd.mmap() as view:
        assert signal_of(lambda: view.__setitem__(slice(0, SIZE), b"\xaa" * SIZE)) == signal.SIGBUS, "a write went through"
        assert signal_of(lambda: view[0]) == signal.SIGBUS, "a read went through"


def mmap_supported(vm: Vm, flags: int) -> None:
    """What is written is there; a punched page reads zeroes and can be written again."""
    with vm.create_guest_memfd(SIZE, flags) as memfd, memfd.mmap() as view:
        view[:] = b"\xaa" * SIZE
        check_equal(view[:], b"\xaa" * SIZE, "the file after writing")
        vm.host.fallocate(memfd.fd, KEEP | PUNCH, 0, PAGE)
        check_equal(view[:], bytes(PAGE) + b"\xaa" * (SIZE - PAGE), "the file after punching its first page")
        view[:PAGE] = b"\xaa" * PAGE
        check_equal(view[:], b"\xaa" * SIZE, "the file after writing its first page again")


def fault_overflow(vm: Vm, flags: int) -> None:
    """A mapping may be longer than the file; beyond its end is SIGBUS, before it everything is as ever."""
    with vm.create_guest_memfd(SIZE, flags) as memfd:
        view = map_beyond(vm.host, memfd, 4 * SIZE)
        try:
            assert signal_of(lambda: fill_pages(view, 4 * SIZE)) == signal.SIGBUS, "a write beyond the end"
            assert signal_of(lambda: view[SIZE : SIZE + 1]) == signal.SIGBUS, "a read beyond the end"
            check_equal(view[0:SIZE], b"\xaa" * SIZE, "the file itself, written by the call that went beyond its end")
        finally:
            view.close()


def fill_pages(view: View, size: int) -> None:
    """Page by page: one copy of all could fault with its first bytes still unwritten."""
    for at in range(0, size, PAGE):
        view[at : at + PAGE] = b"\xaa" * PAGE


def map_beyond(host: Host, memfd: GuestMemfd, length: int) -> View:
    """The file mapped with more than its length, which Python's own mmap refuses on a real file."""
    return hostmem.Overlong(memfd.fd, length) if isinstance(host, KernelHost) else host.mmap(memfd.fd, length)


def numa_allocation(vm: Vm, flags: int) -> None:
    """Pages come from the node that the mapping's policy names, also after they were punched and the policy changed."""
    nodes = hostmem.nodes()
    if len(nodes) < 2:
        skip("this machine has one NUMA node; the test needs two")
    one, two = nodes[:2]
    with vm.create_guest_memfd(SIZE, flags) as memfd, memfd.mmap() as view:
        address = hostmem.address_of(view)
        for first, second in ((two, one), (one, two)):
            hostmem.mbind(address, SIZE // 2, hostmem.MPOL_BIND, [first])
            hostmem.mbind(address + SIZE // 2, SIZE // 2, hostmem.MPOL_BIND, [second])
            view[:] = b"\xaa" * SIZE
            check_equal(hostmem.nodes_of(address, 4), [first, first, second, second], "the nodes of the pages")
            vm.host.fallocate(memfd.fd, KEEP | PUNCH, 0, SIZE)


def collapse(vm: Vm, flags: int) -> None:
    """No huge page can be made of a guest_memfd's small ones, whatever madvise() is asked."""
    size = hostmem.huge_page_size()
    if vm.host.name == "model":
        skip("madvise() is no call of KVM's: the model's mapping is one of an ordinary file, which the kernel collapses if it can")
    if not size:
        skip("this kernel has no transparent huge pages")
    with vm.create_guest_memfd(size, flags) as memfd, memfd.mmap() as view:
        view[:] = b"\xaa" * size
        address = hostmem.address_of(view)
        hostmem.madvise(address, size, hostmem.MADV_HUGEPAGE)
        with expect_errno(EINVAL):
            hostmem.madvise(address, size, hostmem.MADV_COLLAPSE)
        hostmem.madvise(address, size, hostmem.MADV_DONTNEED)
        check_equal(view[:], b"\xaa" * size, "the file after MADV_DONTNEED")


def file_size(vm: Vm, flags: int) -> None:
    """fstat tells the size, and pages as blocks."""
    with vm.create_guest_memfd(SIZE, flags) as memfd:
        status = os.fstat(memfd.fd)
        assert status.st_size == SIZE and status.st_blksize == PAGE


def fallocate(vm: Vm, flags: int) -> None:
    """Allocation must stay inside the file and be of whole pages; a hole may lie beyond the end."""
    with vm.create_guest_memfd(SIZE, flags) as memfd:
        call = vm.host.fallocate
        call(memfd.fd, KEEP, 0, SIZE)
        for mode, offset, length in (
            (KEEP | PUNCH, PAGE - 1, PAGE), (KEEP, SIZE, PAGE), (KEEP, SIZE + PAGE, PAGE), (KEEP | PUNCH, 0, PAGE - 1),
        ):  # fmt: skip
            with expect_errno(EINVAL):
                call(memfd.fd, mode, offset, length)
        for mode, offset in ((KEEP | PUNCH, SIZE), (KEEP | PUNCH, SIZE + PAGE), (KEEP | PUNCH, PAGE), (KEEP, PAGE)):
            call(memfd.fd, mode, offset, PAGE)


def invalid_punch_hole(vm: Vm, flags: int) -> None:
    """A hole is of whole pages."""
    wrong = [(0, 1), (0, PAGE - 1), (0, PAGE + 1)]
    wrong += [(1, length) for length in (1, PAGE - 1, PAGE, PAGE + 1)]
    wrong += [(PAGE, length) for length in (1, PAGE - 1, PAGE + 1)]
    with vm.create_guest_memfd(SIZE, flags) as memfd:
        for offset, length in wrong:
            with expect_errno(EINVAL):
                vm.host.fallocate(memfd.fd, KEEP | PUNCH, offset, length)


def invalid_binding(vm: Vm, flags: int) -> None:
    """An offset at which no file can be is refused, not added up."""
    with vm.create_guest_memfd(SIZE, flags) as memfd, expect_errno(EINVAL):
        if vm.host.name == "kernel" and binds_twice_is(vm, EINVAL):  # this errno became EEXIST when binding was rewritten
            skip("this kernel is older than the check for offsets whose end overflows (Linux 7.3 has it), and binds the file there")
        vm.set_user_memory_region2(0, 0, SIZE, 0, guest_memfd=memfd.fd, guest_memfd_offset=INT64_MAX // PAGE * PAGE)


def binds_twice_is(vm: Vm, errno: int) -> bool:
    """Whether a second slot on the same part of a file is refused with `errno`."""
    with vm.create_guest_memfd(PAGE) as memfd:
        vm.set_user_memory_region2(1, 0, PAGE, 0, guest_memfd=memfd.fd)
        try:
            vm.set_user_memory_region2(2, PAGE, PAGE, 0, guest_memfd=memfd.fd)
        except OSError as refusal:
            return refusal.errno == errno
        finally:
            vm.set_user_memory_region2(1, 0, 0, 0)
        return False


# ---- with a guest
GUEST = r"""
#include "ucall.h"

#define AT	0x100000000UL

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	volatile uint8_t *page = (uint8_t *)AT;

	(void)boot;
	(void)vcpu;
	for (unsigned i = 0; i < PAGE_SIZE; i++)
		GUEST_ASSERT_EQ(page[i], 0xaa);
	memset((void *)AT, 0xff, PAGE_SIZE);
	return 0;
}
"""


@runs_on("plain")
def test_guest_memfd_guest(machine: MachineFactory) -> None:
    """Guest and host see one memory, through a file that is mapped here and is a memslot there."""
    views: list[mmap.mmap] = []

    def prepare(m: Bench) -> None:
        flags = flags_of(m.vm)
        if not flags:
            skip("guest_memfds have no flags here (KVM_CAP_GUEST_MEMFD_FLAGS = 0); use a kernel from 6.18 on, or --on model")
        assert flags & MMAP and flags & SHARED, "a VM without private memory shares its guest_memfds"
        with m.vm.create_guest_memfd(PAGE, MMAP | SHARED) as memfd:
            view = memfd.mmap()
            m.vm.set_user_memory_region2(1, AT, PAGE, hostmem.address_of(view), guest_memfd=memfd.fd)
        view[:] = b"\xaa" * PAGE
        views.append(view)
        m.tables.map(AT, AT, PAGE, private=False)

    m = machine(GUEST, prepare=prepare)
    try:
        m.done()
        check_equal(views[0][:], b"\xff" * PAGE, "the host's view of what the guest wrote")
    finally:
        m.close()  # the VM uses the mapping: it goes first
        views[0].close()


AT = 4 << 30
