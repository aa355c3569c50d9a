"""KVM_MEMORY_ENCRYPT_OP: KVM's checks in their order, the firmware's codes, and what is written back.

KVM's own failures are an errno and leave `error` as it was (here 0x5A5A5A5A); the firmware's are EIO with its code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from errno import EBADF, EBUSY, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import ioctls, psp, sev
from kvmapi.abi.structs import kvm_enc_region
from kvmapi.errors import HostError, KvmError
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import PAGE, Machine

pytestmark = pytest.mark.model
UNTOUCHED = 0x5A5A5A5A
BAD = 8  # nothing is mapped there


class Sev(Machine):
    """A VM of a given type with /dev/sev at hand; commands as raw numbers."""

    def __init__(self, host: Any, type: int = 2) -> None:
        super().__init__(host, type)
        self.device = SevPlatform(host)
        self.closing.append(self.device)

    def op(self, number: int, data: Any = None, fd: int | None = None) -> tuple[int, int]:
        """(errno, `error` afterwards)."""
        address = data if isinstance(data, int) else 0 if data is None else ctypes.addressof(data)
        command = sev.kvm_sev_cmd(id=number, data=address, error=UNTOUCHED, sev_fd=self.device.fd if fd is None else fd)
        result = self.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(command))
        assert (command.id, command.data) == (number, address)
        return -result if result < 0 else result, command.error

    def to(self, state: str) -> None:
        """Bring the guest to a state."""
        steps = ["fresh", "init", "started", "measured", "running"]
        wanted = steps.index(state)
        if wanted >= 1:
            assert self.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init())[0] == 0
        if wanted >= 2:
            assert self.op(sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start())[0] == 0
        if wanted >= 3:
            assert self.measure() == (0, 0)
        if wanted >= 4:
            assert self.op(sev.KVM_SEV_LAUNCH_FINISH) == (0, 0)

    def measure(self) -> tuple[int, int]:
        return self.op(sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure(self.hva, 48))

    def update(self, address: int | None = None, size: int = PAGE) -> tuple[int, int]:
        address = self.hva if address is None else address
        return self.op(sev.KVM_SEV_LAUNCH_UPDATE_DATA, sev.kvm_sev_launch_update_data(address, size))

    def finish(self) -> tuple[int, int]:
        return self.op(sev.KVM_SEV_LAUNCH_FINISH)

    def state(self) -> int:
        data = sev.kvm_sev_guest_status()
        assert self.op(sev.KVM_SEV_GUEST_STATUS, data) == (0, 0)
        return int(data.state)


@pytest.fixture
def vm(model_host: Any, no_leaks: None) -> Iterator[Sev]:
    with Sev(model_host) as made:
        yield made


def test_null_argument_asks_whether_sev_is_there(vm: Sev) -> None:
    assert vm.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, 0) == 0
    assert vm.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, BAD) == -EFAULT


@pytest.mark.parametrize("number", [10, 14, 19, 23, 99, 0xFFFFFFFF])
def test_unknown_ids(vm: Sev, number: int) -> None:
    vm.to("init")
    assert vm.op(number) == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize(
    ("type", "number", "expected"),
    [(0, 0, 0), (2, 0, EINVAL), (1, 0, EINVAL), (0, 1, ENOTTY), (2, 1, EINVAL), (0, 22, EINVAL), (1, 22, EINVAL), (2, 22, 0)],
)
def test_init_wants_its_vm_type(model_host: Any, type: int, number: int, expected: int) -> None:
    with Sev(model_host, type) as vm:
        data = sev.kvm_sev_init() if number == 22 else None
        assert vm.op(number, data) == (expected, UNTOUCHED)


INIT2 = [
    ("flags", sev.kvm_sev_init(flags=1), EINVAL),
    ("features", sev.kvm_sev_init(vmsa_features=1 << 5), EINVAL),
    ("ghcb version", sev.kvm_sev_init(ghcb_version=1), EINVAL),
    ("ghcb version too new", sev.kvm_sev_init(ghcb_version=3), EINVAL),
    ("bad pointer", BAD, EFAULT),
    ("null", 0, EFAULT),
]


@pytest.mark.parametrize(("name", "data", "expected"), INIT2, ids=[row[0] for row in INIT2])
def test_init2_arguments(vm: Sev, name: str, data: Any, expected: int) -> None:
    assert vm.op(sev.KVM_SEV_INIT2, data) == (expected, UNTOUCHED)
    vm.to("init")
    assert vm.op(sev.KVM_SEV_INIT2, BAD) == (EINVAL, UNTOUCHED), "initialised already comes before the pointer"


def test_init_after_vcpus(vm: Sev) -> None:
    vm.add_vcpu()
    assert vm.op(sev.KVM_SEV_INIT2, BAD)[0] == EFAULT, "the pointer comes first"
    assert vm.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init())[0] == EINVAL


def test_run_needs_init2(vm: Sev) -> None:
    with pytest.raises(KvmError) as caught:
        vm.add_vcpu().run()
    assert caught.value.errno == EINVAL


@pytest.mark.parametrize("number", [2, 3, 4, 6, 7, 16])
def test_commands_before_init(vm: Sev, number: int) -> None:
    assert vm.op(number) == (ENOTTY, UNTOUCHED)


def test_launch_start_arguments(vm: Sev) -> None:
    vm.to("init")
    start, data = sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start
    assert vm.op(start, BAD) == (EFAULT, UNTOUCHED)
    for fd, expected in ((-1 & 0xFFFFFFFF, EBADF), (vm.vm.fd, EBADF), (0, EBADF)):
        assert vm.op(start, data(), fd) == (expected, UNTOUCHED)
    assert vm.op(start, data(dh_uaddr=BAD, dh_len=2084)) == (EFAULT, UNTOUCHED)
    assert vm.op(start, data(dh_uaddr=vm.hva, dh_len=0x4001)) == (EINVAL, UNTOUCHED)
    assert vm.op(start, data(session_uaddr=vm.hva, session_len=0)) == (EINVAL, UNTOUCHED)
    assert vm.op(start, data(policy=0xFF << 16)) == (EIO, psp.SEV_RET_POLICY_FAILURE)
    assert vm.op(start, data(policy=sev.SEV_POLICY_ES)) == (EIO, psp.SEV_RET_POLICY_FAILURE)
    good = data()
    assert vm.op(start, good) == (0, 0) and good.handle > 0
    assert vm.op(start, data())[0] == EIO


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, PAGE, (0, 0)), (16, 16, (0, 0)), (0, 0, (EINVAL, UNTOUCHED)),
        (8, 16, (EIO, psp.SEV_RET_INVALID_ADDRESS)), (0, 24, (EIO, psp.SEV_RET_INVALID_LEN)), (0, 8, (EIO, psp.SEV_RET_INVALID_LEN)),
    ],
)  # fmt: skip
def test_update_data(vm: Sev, offset: int, size: int, expected: tuple[int, int]) -> None:
    vm.to("started")
    before = vm.get(0, 2 * PAGE)
    assert vm.update(vm.hva + offset, size) == expected
    after = vm.get(0, 2 * PAGE)
    assert (after[offset : offset + 16] != before[offset : offset + 16]) == (expected[0] == 0)
    assert after[offset + size :] == before[offset + size :] and after[:offset] == before[:offset]


def test_update_data_of_memory_that_cannot_be_pinned(vm: Sev) -> None:
    vm.to("started")
    text = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "Py_Version")) & -PAGE  # read-only data of a library
    assert vm.update(text, PAGE) == (ENOMEM, UNTOUCHED)
    assert vm.update(0x10000, PAGE) == (ENOMEM, UNTOUCHED)
    assert vm.update((1 << 64) - PAGE, 2 * PAGE) == (EINVAL, UNTOUCHED)
    assert vm.update(0xFFFF888000000000, PAGE) == (ENOMEM, UNTOUCHED)


def test_measure_arguments(vm: Sev) -> None:
    vm.to("started")
    ask, data = sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure
    query = data(0, 0)
    assert vm.op(ask, query) == (EIO, psp.SEV_RET_INVALID_LEN) and query.len == 48
    short = data(vm.hva, 47)
    assert vm.op(ask, short) == (EIO, psp.SEV_RET_INVALID_LEN) and short.len == 47
    assert vm.op(ask, data(vm.hva, 0x4001)) == (EINVAL, UNTOUCHED)
    assert vm.op(ask, data(BAD, 48)) == (EFAULT, UNTOUCHED) and vm.state() == sev.SEV_STATE_LAUNCH_UPDATE
    assert vm.op(ask, BAD) == (EFAULT, UNTOUCHED)
    assert vm.op(ask, data(vm.hva, 0x4000)) == (0, 0) and vm.state() == sev.SEV_STATE_LAUNCH_SECRET


@pytest.mark.parametrize(("state", "allowed"), [("started", {"update", "measure"}), ("measured", {"finish"}), ("running", set())])
def test_wrong_states(model_host: Any, state: str, allowed: set[str]) -> None:
    for name in ("update", "measure", "finish"):
        with Sev(model_host) as vm:
            vm.to(state)
            before = vm.state()
            got = {"update": vm.update, "measure": vm.measure, "finish": vm.finish}[name]()
            assert got == ((0, 0) if name in allowed else (EIO, psp.SEV_RET_INVALID_GUEST_STATE))
            assert name in allowed or vm.state() == before


def test_vmsa_of_a_guest_without_es(vm: Sev) -> None:
    vm.to("started")
    assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (ENOTTY, UNTOUCHED)


def region(vm: Sev, address: int, size: int, *, undo: bool = False) -> int:
    request = ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION if undo else ioctls.KVM_MEMORY_ENCRYPT_REG_REGION
    argument = kvm_enc_region(address, size)
    return -vm.vm.ioctl_raw(request, ctypes.addressof(argument))


def test_regions(vm: Sev) -> None:
    assert region(vm, vm.hva, PAGE) == ENOTTY
    vm.to("init")
    assert region(vm, vm.hva, 0) == EINVAL and region(vm, (1 << 64) - PAGE, 2 * PAGE) == EINVAL
    assert region(vm, 0x10000, PAGE) == ENOMEM
    assert region(vm, vm.hva + 5, 100) == 0, "any alignment"
    assert region(vm, vm.hva, PAGE) == region(vm, vm.hva, PAGE) == 0, "no dedupe"
    assert region(vm, vm.hva, 2 * PAGE, undo=True) == EINVAL and region(vm, vm.hva + PAGE, PAGE, undo=True) == EINVAL
    assert [region(vm, vm.hva, PAGE, undo=True) for _ in range(3)] == [0, 0, EINVAL]
    assert region(vm, vm.hva + 5, 100, undo=True) == 0
    assert vm.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, BAD) == -EFAULT


def test_the_pin_limit(vm: Sev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.host, "memlock_limit", lambda: 4 * PAGE)
    vm.to("started")
    assert region(vm, vm.hva, 5 * PAGE) == ENOMEM and region(vm, vm.hva, 3 * PAGE) == 0
    assert region(vm, vm.hva, 2 * PAGE) == ENOMEM, "registered pages count"
    assert vm.update(vm.hva, 2 * PAGE) == (ENOMEM, UNTOUCHED) and vm.update(vm.hva, PAGE) == (0, 0)
    assert region(vm, vm.hva, 3 * PAGE, undo=True) == 0 and region(vm, vm.hva, 4 * PAGE) == 0


def test_asids_run_out_and_come_back() -> None:
    host = ModelHost(Platform(asids=2))
    with Sev(host) as one, Sev(host, 0) as two, Sev(host) as three:
        assert one.op(22, sev.kvm_sev_init())[0] == two.op(0)[0] == 0
        assert three.op(22, sev.kvm_sev_init()) == (EBUSY, UNTOUCHED)
        one.vm.close()
        assert three.op(22, sev.kvm_sev_init())[0] == 0
        assert two.op(0)[0] == EINVAL, "initialised already"


def test_a_platform_without_sev() -> None:
    host = ModelHost(Platform(sev=False))
    with pytest.raises(HostError):
        SevPlatform(host)
    with Machine(host) as machine:
        assert machine.system.check_extension(235) == 0x3
        assert machine.system.ioctl_raw(ioctls.KVM_CREATE_VM, 2) == -EINVAL
        assert machine.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, 0) == -ENOTTY
        assert machine.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, BAD) == -ENOTTY
        leaf = next(e for e in machine.system.supported_cpuid() if e.function == 0x8000001F)
        assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0, 0, 0, 0)
