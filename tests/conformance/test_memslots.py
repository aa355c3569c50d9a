"""KVM_SET_USER_MEMORY_REGION and REGION2: every condition, in the kernel's order (virt/kvm/kvm_main.c).

Each row breaks one rule. Rows named "before" break two at once: the errno tells which check comes first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from errno import EBADF, EEXIST, EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import structs as s
from kvmapi.errors import KvmError
from tests.conformance.rows import OK, Differs, Row, expect_errno, parametrize
from tests.conformance.snippets import MIB, PAGE, Machine

LOG, READONLY, GMEM = kvm.KVM_MEM_LOG_DIRTY_PAGES, kvm.KVM_MEM_READONLY, kvm.KVM_MEM_GUEST_MEMFD
USER_TOP = 0x7FFFFFFFF000
V1, V2 = s.kvm_userspace_memory_region, s.kvm_userspace_memory_region2


def v1(slot: int = 1, flags: int = 0, gpa: int = 16 * MIB, size: int = MIB, hva: int | None = None) -> Callable[[Machine], Any]:
    """The argument of the old ioctl."""
    return lambda machine: V1(slot, flags, gpa, size, machine.hva if hva is None else hva)


def v2(
    slot: int = 1,
    flags: int = 0,
    gpa: int = 16 * MIB,
    size: int = MIB,
    hva: int | None = None,
    offset: int = 0,
    fd: int | Callable[[Machine], int] = -1,
) -> Callable[[Machine], Any]:
    """The argument of the new one; `fd` may be made from the machine."""

    def make(machine: Machine) -> Any:
        number = fd(machine) if callable(fd) else fd
        return V2(slot, flags, gpa, size, machine.hva if hva is None else hva, offset, number & 0xFFFFFFFF)

    return make


def have(**slot: Any) -> Callable[[Machine], object]:
    """Setup: this slot exists already."""
    return lambda machine: do(machine, v1(**slot)(machine))


def do(machine: Machine, argument: Any) -> int:
    """The errno of the ioctl that takes this struct."""
    request = ioctls.KVM_SET_USER_MEMORY_REGION if isinstance(argument, V1) else ioctls.KVM_SET_USER_MEMORY_REGION2
    return expect_errno(machine.vm.ioctl_raw(request, ctypes.addressof(argument)))


def memfd(size: int = MIB, flags: int = 0) -> Callable[[Machine], int]:
    """An fd of a new guest_memfd of the machine's VM."""

    def make(machine: Machine) -> int:
        made = machine.vm.create_guest_memfd(size, flags)
        machine.closing.append(made)
        return made.fd

    return make


def stranger(machine: Machine) -> int:
    """A guest_memfd of another VM."""
    other = machine.system.create_vm()
    made = other.create_guest_memfd(MIB)
    machine.closing += [made, other]
    return made.fd


def bind(slot: int, gpa: int, offset: int, size: int = MIB) -> Callable[[Machine], object]:
    """Setup: `shared` guest_memfd of 4 MiB, bound."""

    def setup(machine: Machine) -> None:
        assert do(machine, v2(slot, GMEM, gpa, size, offset=offset, fd=shared)(machine)) == OK

    return setup


def shared(machine: Machine) -> int:
    """One guest_memfd of 4 MiB per machine, made when first asked for."""
    if not machine.closing:
        machine.closing.append(machine.vm.create_guest_memfd(4 * MIB))
    fd: int = machine.closing[0].fd
    return fd


OLD = "guest_memfd on plain VMs"
NO_MEMFD = Differs(OLD, EINVAL, "before 6.18 only VMs with private memory may bind a guest_memfd")

ROWS = [
    # 2: the old ioctl knows two flags
    Row("v1 with GUEST_MEMFD", EINVAL, v1(flags=GMEM)),
    Row("v1 with an unknown flag", EINVAL, v1(flags=8)),
    Row("v1 with LOG_DIRTY", OK, v1(flags=LOG)),
    Row("v1 with READONLY", OK, v1(flags=READONLY)),
    Row("v1 with both", OK, v1(flags=LOG | READONLY)),
    # 3: ids, address spaces
    Row("last id", OK, v1(slot=kvm.KVM_USER_MEM_SLOTS - 1)),
    Row("id beyond the last", EINVAL, v1(slot=kvm.KVM_USER_MEM_SLOTS)),
    Row("id 0xffff", EINVAL, v1(slot=0xFFFF)),
    Row("address space out of range", EINVAL, v1(slot=7 << 16 | 1)),
    Row("second address space", OK, v1(slot=1 << 16 | 1), differs=(
        Differs("a second address space", EINVAL, "SMM is not built in, or the VM type has none"),
    )),
    # 4: flags of the new ioctl
    Row("v2 plain", OK, v2()),
    Row("v2 with an unknown flag", EINVAL, v2(flags=8)),
    Row("GUEST_MEMFD excludes LOG_DIRTY", EINVAL, v2(flags=GMEM | LOG, fd=shared)),
    Row("GUEST_MEMFD excludes READONLY", EINVAL, v2(flags=GMEM | READONLY, fd=shared)),
    Row("v2 flags before the fd", EINVAL, v2(flags=GMEM | LOG, fd=-1)),
    # 5: alignment and the user range
    Row("size unaligned", EINVAL, v1(size=MIB + 1)),
    Row("size below a page", EINVAL, v1(size=0x800)),
    Row("gpa unaligned", EINVAL, v1(gpa=16 * MIB + 0x800)),
    Row("hva unaligned", EINVAL, v1(hva=0x100001)),
    Row("hva 0", OK, v1(hva=0)),
    Row("hva that nothing is mapped at", OK, v1(hva=0x10000)),
    Row("hva up to the top", OK, v1(hva=USER_TOP - MIB)),
    Row("hva over the top", EINVAL, v1(hva=USER_TOP - MIB + PAGE)),
    Row("hva of the kernel", EINVAL, v1(hva=0xFFFF888000000000)),
    Row("hva that wraps", EINVAL, v1(hva=(1 << 64) - PAGE)),
    Row("gpa wraps", EINVAL, v1(gpa=(1 << 64) - PAGE, size=2 * PAGE)),
    Row("gpa ends at 2^64", EINVAL, v1(gpa=(1 << 64) - PAGE, size=PAGE)),
    Row("gpa beyond every physical address", EINVAL, v1(gpa=1 << 52, size=PAGE)),
    Row("gpa high but within the width", OK, v1(gpa=1 << 46, size=PAGE), differs=(
        Differs("wide GPAs", EINVAL, "this CPU or shadow MMU has fewer physical address bits"),
    )),
    # 6: the guest_memfd's offset
    Row("memfd offset unaligned", EINVAL, v2(flags=GMEM, offset=0x800, fd=shared)),
    Row("memfd offset wraps", EINVAL, v2(flags=GMEM, offset=(1 << 64) - PAGE, fd=shared)),
    Row("offset is not looked at without the flag", OK, v2(offset=0x800)),
    Row("offset before the fd", EINVAL, v2(flags=GMEM, offset=0x800, fd=-1)),
    # 7: size
    Row("2^31 pages", EINVAL, v1(size=1 << 43, hva=0)),
    # 8: deletion
    Row("delete an absent slot", EINVAL, v1(size=0)),
    Row("delete", OK, v1(size=0), setup=have()),
    Row("delete with other addresses", OK, v1(size=0, gpa=0, hva=0), setup=have()),
    Row("delete checks the flags", EINVAL, v1(size=0, flags=8), setup=have()),
    Row("delete checks alignment", EINVAL, v1(size=0, gpa=1), setup=have()),
    # 9: changes
    Row("the same again", OK, v1(), setup=have()),
    Row("grow", EINVAL, v1(size=2 * MIB), setup=have()),
    Row("shrink", EINVAL, v1(size=PAGE), setup=have()),
    Row("another hva", EINVAL, v1(hva=0x10000), setup=have()),
    Row("toggle READONLY", EINVAL, v1(flags=READONLY), setup=have()),
    Row("toggle LOG_DIRTY", OK, v1(flags=LOG), setup=have()),
    Row("move", OK, v1(gpa=32 * MIB), setup=have()),
    Row("move beyond every physical address", EINVAL, v1(gpa=1 << 52), setup=have()),
    Row("move and change the flags", OK, v1(gpa=32 * MIB, flags=LOG), setup=have()),
    Row("move and toggle READONLY", EINVAL, v1(gpa=32 * MIB, flags=READONLY), setup=have()),
    Row("change before overlap", EINVAL, v1(gpa=0, hva=0x10000), setup=have()),
    Row("move by half of itself", OK, v1(gpa=16 * MIB + MIB // 2), setup=have()),
    Row("change a guest_memfd slot", EINVAL, v2(3, GMEM, 64 * MIB, fd=shared), setup=bind(3, 64 * MIB, 0), needs=OLD),
    Row("flags of a guest_memfd slot", EINVAL, v2(3, 0, 64 * MIB), setup=bind(3, 64 * MIB, 0), needs=OLD),
    Row("delete a guest_memfd slot", OK, v2(3, 0, 64 * MIB, 0), setup=bind(3, 64 * MIB, 0), needs=OLD),
    # 10: overlap
    Row("create over slot 0", EEXIST, v1(gpa=MIB)),
    Row("create over its last page", EEXIST, v1(gpa=2 * MIB - PAGE)),
    Row("create behind it", OK, v1(gpa=2 * MIB)),
    Row("move onto slot 0", EEXIST, v1(gpa=0), setup=have()),
    Row("overlap before the fd", EEXIST, v2(flags=GMEM, gpa=MIB, fd=-1), differs=(NO_MEMFD,)),
    # 11: binding
    Row("bind", OK, v2(flags=GMEM, fd=shared), differs=(NO_MEMFD,)),
    Row("bind the end", OK, v2(flags=GMEM, offset=3 * MIB, fd=shared), differs=(NO_MEMFD,)),
    Row("bind beyond the end", EINVAL, v2(flags=GMEM, offset=3 * MIB + PAGE, fd=shared)),
    Row("bind a closed fd", EBADF, v2(flags=GMEM, fd=-1), differs=(NO_MEMFD,)),
    Row("bind what is no guest_memfd", EINVAL, v2(flags=GMEM, fd=lambda machine: machine.vm.fd)),
    Row("bind another VM's", EINVAL, v2(flags=GMEM, fd=stranger), needs="guest_memfd"),
    Row("bind a range twice", EEXIST, v2(4, GMEM, 80 * MIB, fd=shared), setup=bind(3, 64 * MIB, 0), needs=OLD, older=EINVAL),
    Row("bind an overlapping range", EEXIST, v2(4, GMEM, 80 * MIB, offset=MIB - PAGE, fd=shared),
        setup=bind(3, 64 * MIB, 0), needs=OLD, older=EINVAL),
    Row("width before a range bound twice", EINVAL, v2(4, GMEM, 1 << 52, fd=shared), setup=bind(3, 64 * MIB, 0), needs=OLD),
    Row("overlap before a file that is no guest_memfd", EEXIST, v2(4, GMEM, MIB, fd=lambda machine: machine.vm.fd), differs=(NO_MEMFD,)),
    Row("a file of another kind before the width", EBADF, v2(4, GMEM, 1 << 52, fd=-1), differs=(NO_MEMFD,)),
    Row("bind a range around a bound one", EEXIST, v2(4, GMEM, 80 * MIB, size=3 * MIB, fd=shared), setup=bind(3, 64 * MIB, MIB),
        needs=OLD, older=EINVAL),
    Row("bind before a bound range", OK, v2(4, GMEM, 80 * MIB, fd=shared), setup=bind(3, 64 * MIB, MIB), needs=OLD),
    Row("bind the neighbour", OK, v2(4, GMEM, 80 * MIB, offset=MIB, fd=shared), setup=bind(3, 64 * MIB, 0), needs=OLD),
    Row("bind again after deletion", OK, v2(4, GMEM, 80 * MIB, fd=shared), setup=lambda machine: (
        bind(3, 64 * MIB, 0)(machine), do(machine, v2(3, 0, 64 * MIB, 0)(machine))
    ), needs=OLD),
]  # fmt: skip


@parametrize(ROWS)
def test_condition(any_host: Any, row: Row) -> None:
    with Machine(any_host) as machine:
        row.expectation(machine)
        if row.setup is not None:
            row.setup(machine)
        assert row.right(machine, -do(machine, row.argument(machine)))


@pytest.mark.parametrize("request_name", ["KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"])
@pytest.mark.parametrize("pointer", [0, 8, 0xFFFF888000000000, (1 << 64) - 8])
def test_bad_pointer(any_host: Any, request_name: str, pointer: int) -> None:
    with Machine(any_host) as machine:
        assert machine.vm.ioctl_raw(getattr(ioctls, request_name), pointer) == -EFAULT


def test_a_failed_change_changes_nothing(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.vm.set_user_memory_region(1, 16 * MIB, MIB, machine.hva)
        with pytest.raises(KvmError):
            machine.vm.set_user_memory_region(1, MIB, MIB, machine.hva)  # onto slot 0
        assert do(machine, v1(2, gpa=16 * MIB)(machine)) == EEXIST  # slot 1 is where it was
        assert do(machine, v1(1)(machine)) == OK


def test_moving_frees_the_old_place(any_host: Any) -> None:
    with Machine(any_host) as machine:
        machine.vm.set_user_memory_region(1, 16 * MIB, MIB, machine.hva)
        machine.vm.set_user_memory_region(1, 32 * MIB, MIB, machine.hva)
        assert do(machine, v1(2, gpa=16 * MIB)(machine)) == OK
        assert do(machine, v1(3, gpa=32 * MIB)(machine)) == EEXIST


def test_many_slots(any_host: Any) -> None:
    """The last slot number, neighbours without gaps, and none lost when every second one goes."""
    with Machine(any_host) as machine:
        for number in range(1, 301):
            machine.vm.set_user_memory_region(number, 16 * MIB + number * PAGE, PAGE, machine.hva)
        for number in range(2, 301, 2):
            assert do(machine, v1(number, size=0)(machine)) == OK
        for number in range(1, 301):
            expected = EEXIST if number % 2 else OK
            assert do(machine, v1(1000 + number, gpa=16 * MIB + number * PAGE, size=PAGE)(machine)) == expected
