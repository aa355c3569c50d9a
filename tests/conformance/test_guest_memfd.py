"""guest_memfd: making, allocating, punching, mapping; and that the fd shows no memory (virt/kvm/guest_memfd.c)."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import EBADF, EEXIST, EFAULT, EFBIG, EINVAL, ENODEV, EOPNOTSUPP, EPERM, ESPIPE
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
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
    ("punch a page partly", KEEP | PUNCH, 0, PAGE + 1, EINVAL),
    ("the end wraps", KEEP | PUNCH, (1 << 63) - PAGE, PAGE, EFBIG),
    ("the last byte there can be", KEEP | PUNCH, (1 << 63) - 2 * PAGE, PAGE, OK),
    ("the wrap before the mode", 0, (1 << 63) - PAGE, PAGE, EFBIG),
    ("nothing before the mode", 0, 0, 0, EINVAL),
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


def attempts(fd: int) -> dict[str, Callable[[], object]]:
    """Ways at a file that a guest_memfd does not have."""
    return {
        "read": lambda: os.read(fd, 16),
        "write": lambda: os.write(fd, b"x"),
        "pread": lambda: os.pread(fd, 16, 0),
        "pwrite": lambda: os.pwrite(fd, b"x", 0),
        "shrink": lambda: os.ftruncate(fd, PAGE),
        "grow": lambda: os.ftruncate(fd, 4 * PAGE),
    }


@pytest.mark.parametrize("way", attempts(-1))
def test_the_fd_gives_and_takes_nothing(any_host: Any, way: str) -> None:
    """Where the kernel under the model has no memfd_secret, the placeholder refuses with other errnos (EBADF, EPERM)."""
    expected = {ESPIPE if way in ("pread", "pwrite") else EINVAL}
    if any_host.name == "model":
        expected |= {EBADF, EPERM}
    with Machine(any_host) as machine, machine.vm.create_guest_memfd(2 * PAGE) as memfd:
        for fd in (memfd.fd, os.dup(memfd.fd)):
            with pytest.raises(OSError) as caught:
                attempts(fd)[way]()
            assert caught.value.errno in expected
        os.close(fd)
        assert os.fstat(memfd.fd).st_size == 2 * PAGE


def test_without_memfd_secret(model_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other placeholder, on any machine."""
    monkeypatch.setattr("kvmapi.model.placeholder.SYS_MEMFD_SECRET", -1)
    with Machine(model_host) as machine, machine.vm.create_guest_memfd(2 * PAGE) as memfd:
        for attempt in attempts(memfd.fd).values():
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno in (EBADF, EPERM)
        assert os.fstat(memfd.fd).st_size == 2 * PAGE


TOUCH = """
import ctypes
import sys
from kvmapi.abi import kvm
from kvmapi.system import System
if sys.argv[1] == "kernel":
    from kvmapi.kernel import KernelHost as Host
else:
    from kvmapi.model.host import ModelHost as Host
flags, length, at = map(int, sys.argv[2:])
memfd = System(Host()).create_vm().create_guest_memfd(8192, flags)
if sys.argv[1] == "kernel":  # Python's mmap refuses a length beyond the file's
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    at_address = libc.mmap(None, ctypes.c_size_t(length), 3, 1, memfd.fd, ctypes.c_long(0))
    view = (ctypes.c_ubyte * length).from_address(at_address)
else:
    view = memfd.mmap(length)
print("mapped", flush=True)
print(view[at], flush=True)
"""


@pytest.mark.parametrize(
    ("name", "flags", "length", "at", "dies"),
    [
        ("shared", MMAP | SHARED, 2 * PAGE, PAGE, False),
        ("private", MMAP, 2 * PAGE, 0, True),
        ("the last byte", MMAP | SHARED, 4 * PAGE, 2 * PAGE - 1, False),
        ("beyond the end", MMAP | SHARED, 4 * PAGE, 2 * PAGE, True),
    ],
)
def test_touching_a_mapping(any_host: Any, tree: Path, name: str, flags: int, length: int, at: int, dies: bool) -> None:
    with Machine(any_host) as machine:
        _need_flags(machine)
    command = [sys.executable, "-c", TOUCH, any_host.name, str(flags), str(length), str(at)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60, check=False)
    if dies:
        assert (done.returncode, done.stdout) == (-signal.SIGBUS, "mapped\n"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "mapped\n0\n"), done.stderr


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


@pytest.mark.parametrize("number", [*range(3, 12), 31, 32, 62, 63])
def test_single_flags(any_host: Any, number: int) -> None:
    """Every bit that KVM_CAP_GUEST_MEMFD_FLAGS does not name is refused; and each that it names is taken."""
    with Machine(any_host) as machine:
        known = machine.vm.check_extension(caps.KVM_CAP_GUEST_MEMFD_FLAGS)
        for bit in (number, number % 2):
            argument = s.kvm_create_guest_memfd(size=PAGE, flags=1 << bit)
            result = machine.vm.ioctl_raw(ioctls.KVM_CREATE_GUEST_MEMFD, ctypes.addressof(argument))
            assert (result >= 0) == bool(known >> bit & 1) and (result >= 0 or result == -EINVAL)
            if result >= 0:
                any_host.close(result)


def test_a_slot_survives_its_file(any_host: Any) -> None:
    """Closing the file leaves the slot, which can be deleted; the file's pages are free for nobody any more."""
    with Machine(any_host) as machine:
        _need_flags(machine)
        memfd = machine.vm.create_guest_memfd(MIB)
        machine.vm.set_user_memory_region2(5, 16 * MIB, MIB, machine.hva, guest_memfd=memfd.fd)
        memfd.close()
        with pytest.raises(KvmError) as caught:
            machine.vm.set_user_memory_region(6, 16 * MIB, MIB, machine.hva)
        assert caught.value.errno == EEXIST
        machine.vm.set_user_memory_region(5, 16 * MIB, 0, machine.hva)
        machine.vm.set_user_memory_region(6, 16 * MIB, MIB, machine.hva)
