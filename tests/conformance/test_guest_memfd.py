"""guest_memfd: making, allocating, punching, mapping; and that the fd shows no memory (virt/kvm/guest_memfd.c)."""

from __future__ import annotations

import ctypes
import mmap
import os
from errno import EFAULT, EINVAL, ENODEV, EOPNOTSUPP
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt
from kvmapi.memfd import GuestMemfd
from tests.conformance.rows import OK, Differs, Row, feature, parametrize
from tests.conformance.snippets import CODE, MIB, PAGE, LongGuest, Machine, code

MMAP, SHARED = kvm.GUEST_MEMFD_FLAG_MMAP, kvm.GUEST_MEMFD_FLAG_INIT_SHARED
FLAGS = "guest_memfd on plain VMs"
NO_FLAGS = Differs(FLAGS, EINVAL, "before 6.18 guest_memfd has no flags")
KEEP, PUNCH = 1, 2


def made(size: int, flags: int = 0) -> Any:
    return lambda machine: s.kvm_create_guest_memfd(size=size & (1 << 64) - 1, flags=flags)


CREATE = [
    Row("a page", OK, made(PAGE)),
    Row("1 TiB", OK, made(1 << 40)),
    Row("empty", EINVAL, made(0)),
    Row("negative", EINVAL, made(-PAGE)),
    Row("unaligned", EINVAL, made(PAGE + 1)),
    Row("mappable", OK, made(PAGE, MMAP), differs=(NO_FLAGS,)),
    Row("shared", OK, made(PAGE, SHARED), differs=(NO_FLAGS,)),
    Row("mappable and shared", OK, made(PAGE, MMAP | SHARED), differs=(NO_FLAGS,)),
    Row("unknown flag", EINVAL, made(PAGE, 4)),
    Row("flag bit 63", EINVAL, made(PAGE, 1 << 63)),
    Row("unknown flag and bad size", EINVAL, made(1, 4)),
]  # fmt: skip


@parametrize(CREATE)
def test_create(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        expected = row.expectation(machine)
        argument = row.argument(machine)
        result = machine.vm.ioctl_raw(ioctls.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(argument))
        if result >= 0:
            assert os.fstat(result).st_size == argument.size and os.fstat(result).st_blksize == PAGE
            any_host.close(result)
        assert (-result if result < 0 else 0) == expected


def test_create_needs_a_pointer(any_host: Any) -> None:
    with Machine(any_host) as machine:
        assert machine.vm.ioctl_raw(ioctls.KVM_CREATE_GUEST_MEMFD, 8) == -EFAULT


FALLOCATE = [
    ("all of it", KEEP, 0, 4 * PAGE, OK),
    ("punch", KEEP | PUNCH, PAGE, PAGE, OK),
    ("punch beyond the end", KEEP | PUNCH, 64 * PAGE, PAGE, OK),
    ("punch over the end", KEEP | PUNCH, 3 * PAGE, 64 * PAGE, OK),
    ("allocate beyond the end", KEEP, 4 * PAGE, PAGE, EINVAL),
    ("allocate over the end", KEEP, 3 * PAGE, 2 * PAGE, EINVAL),
    ("without KEEP_SIZE", 0, 0, PAGE, EOPNOTSUPP),
    ("punch without KEEP_SIZE", PUNCH, 0, PAGE, EOPNOTSUPP),
    ("ZERO_RANGE", KEEP | 0x10, 0, PAGE, EOPNOTSUPP),
    ("COLLAPSE_RANGE", 0x8, 0, PAGE, EOPNOTSUPP),
    ("offset unaligned", KEEP, 0x800, PAGE, EINVAL),
    ("length unaligned", KEEP, 0, 0x800, EINVAL),
    ("hole unaligned", KEEP | PUNCH, 0x800, PAGE, EINVAL),
    ("length 0", KEEP, 0, 0, EINVAL),
    ("negative offset", KEEP, -PAGE, PAGE, EINVAL),
    ("negative length", KEEP, 0, -PAGE, EINVAL),
    ("mode before alignment", 0, 1, PAGE, EOPNOTSUPP),
]


@pytest.mark.parametrize(("name", "mode", "offset", "length", "expected"), FALLOCATE, ids=[row[0] for row in FALLOCATE])
def test_fallocate(any_host: Any, name: str, mode: int, offset: int, length: int, expected: int) -> None:
    with Machine(any_host) as machine, machine.vm.create_guest_memfd(4 * PAGE) as memfd:
        if not expected:
            any_host.fallocate(memfd.fd, mode, offset, length)
            return
        with pytest.raises(OSError) as caught:
            any_host.fallocate(memfd.fd, mode, offset, length)
        assert caught.value.errno == expected


def _need_flags(machine: Machine) -> None:
    if not feature(machine, FLAGS):
        pytest.skip(f"{machine.host.name}: no {FLAGS}")


def test_mmap_rules(any_host: Any) -> None:
    with Machine(any_host) as machine:
        with machine.vm.create_guest_memfd(PAGE) as closed, pytest.raises(KvmError) as caught:
            closed.mmap()
        assert caught.value.errno == ENODEV
        _need_flags(machine)
        with machine.vm.create_guest_memfd(PAGE, MMAP | SHARED) as memfd:
            with pytest.raises(OSError) as refused:
                any_host.mmap(memfd.fd, PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE)
            assert refused.value.errno == EINVAL
            with memfd.mmap() as view:
                assert view[:] == bytes(PAGE)
                view[:4] = b"data"
                with memfd.mmap() as again:
                    assert again[:4] == b"data"
        with machine.vm.create_guest_memfd(PAGE, MMAP) as private, private.mmap() as unreadable:
            assert len(unreadable) == PAGE  # touching it is SIGBUS: it holds private memory


def test_the_fd_itself_shows_nothing(any_host: Any) -> None:
    with Machine(any_host) as machine, machine.vm.create_guest_memfd(2 * PAGE) as memfd:
        for attempt in (lambda: os.pread(memfd.fd, 16, 0), lambda: os.pwrite(memfd.fd, b"x", 0), lambda: os.ftruncate(memfd.fd, PAGE)):
            try:
                got = attempt()
            except OSError:
                continue
            assert any_host.name == "model" and not any(got if isinstance(got, bytes) else b""), "a placeholder may be touched, not shown"


def test_each_file_has_an_inode(any_host: Any) -> None:
    with Machine(any_host) as machine, machine.vm.create_guest_memfd(PAGE) as one, machine.vm.create_guest_memfd(PAGE) as two:
        assert os.fstat(one.fd).st_ino != os.fstat(two.fd).st_ino


def bound(machine: LongGuest, flags: int) -> GuestMemfd:
    """A guest_memfd behind GPA 16 MiB, and user memory as the other side."""
    memfd = machine.vm.create_guest_memfd(2 * MIB, flags)
    machine.closing.append(memfd)
    machine.vm.set_user_memory_region2(5, 16 * MIB, 2 * MIB, machine.hva, guest_memfd=memfd.fd)
    return memfd


STORE = code("48c70425 00000001 34120000 f4", "mov qword ptr [0x1000000], 0x1234; hlt")


def _need_mappable_backing(machine: Machine) -> None:
    _need_flags(machine)
    if not feature(machine, "hardware virtualization"):
        pytest.skip(f"{machine.host.name}: its paravirtual MMU maps the slot's user memory although the guest_memfd is mappable")


def test_a_mappable_file_is_the_guest_memory(any_host: Any) -> None:
    """A slot on a mappable file takes every access of the guest there; the slot's user address is not used."""
    with LongGuest(any_host, STORE) as guest:
        _need_mappable_backing(guest)
        memfd = bound(guest, MMAP | SHARED)
        before = guest.get(0, 16)
        assert guest.run() == Hlt()
        with memfd.mmap() as view:
            assert view[:8] == (0x1234).to_bytes(8, "little")
        assert guest.get(0, 16) == before


def test_punching_zeroes(any_host: Any) -> None:
    load = code("488b0425 00000001 f4", "mov rax, qword ptr [0x1000000]; hlt")
    with LongGuest(any_host, STORE) as guest:
        _need_mappable_backing(guest)
        memfd = bound(guest, MMAP | SHARED)
        assert guest.run() == Hlt()
        guest.put(CODE, load)
        assert guest.again() == Hlt() and guest.regs().rax == 0x1234
        memfd.punch_hole(0, 2 * MIB)
        assert guest.again() == Hlt() and guest.regs().rax == 0


def test_a_slot_without_mmap_leaves_shared_accesses_to_user_memory(any_host: Any) -> None:
    with LongGuest(any_host, STORE) as guest:
        _need_flags(guest)
        bound(guest, 0)
        assert guest.run() == Hlt()
        assert guest.get(0, 8) == (0x1234).to_bytes(8, "little")


def test_the_file_keeps_its_vm(any_host: Any, no_leaks: None) -> None:
    """Closing the VM's fd first is allowed; all is gone with the last fd."""
    with Machine(any_host) as machine:
        memfd = machine.vm.create_guest_memfd(PAGE)
        machine.vm.close()
        memfd.allocate(0, PAGE)
        memfd.punch_hole(0, PAGE)
        memfd.close()
