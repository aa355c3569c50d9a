"""KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION: what can be registered, what must match, and what it all counts."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from errno import EFAULT, EINVAL, ENOMEM, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import ioctls, sev
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from tests.conformance.snippets import PAGE, Machine
from tests.model.sev_vm import BAD, UNTOUCHED, Sev, buffer

pytestmark = pytest.mark.model
TOP = 1 << 64


@pytest.fixture
def vm(model_host: Any) -> Iterator[Sev]:
    with Sev(model_host) as made:
        yield made


def test_not_a_guest(vm: Sev) -> None:
    assert vm.region(vm.hva, PAGE) == vm.region(vm.hva, PAGE, undo=True) == ENOTTY
    for request in (ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION):
        assert vm.vm.ioctl_raw(request, BAD) == -EFAULT, "the pointer comes first"
    with Machine(ModelHost(Platform(sev=False))) as plain:
        assert plain.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, BAD) == -EFAULT
        assert plain.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, vm.hva) == -ENOTTY


def test_regions(vm: Sev) -> None:
    vm.to("init")
    assert vm.region(vm.hva, 0) == EINVAL and vm.region(TOP - PAGE, PAGE) == vm.region(TOP - PAGE, 2 * PAGE) == EINVAL
    assert vm.region(vm.hva + 5, 100) == 0, "any alignment"
    assert vm.region(vm.hva, PAGE) == vm.region(vm.hva, PAGE) == 0, "no dedupe"
    assert vm.region(vm.hva, 2 * PAGE, undo=True) == EINVAL and vm.region(vm.hva + PAGE, PAGE, undo=True) == EINVAL
    assert [vm.region(vm.hva, PAGE, undo=True) for _ in range(3)] == [0, 0, EINVAL]
    assert vm.region(vm.hva + 5, 100, undo=True) == 0


def test_more_than_there_is(vm: Sev) -> None:
    """KVM counts pages before it looks for them: more than an int, more than the machine's memory."""
    vm.to("init")
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE
    assert vm.region(vm.hva, (1 << 31) * PAGE) == vm.region(vm.hva, memory + PAGE) == EINVAL
    assert vm.region(PAGE, memory // 2) == ENOMEM


def test_what_cannot_be_pinned(vm: Sev) -> None:
    vm.to("init")
    assert vm.region(0x10000, PAGE) == ENOMEM and vm.region(0xFFFF888000000000, PAGE) == ENOMEM
    with buffer(6) as memory:
        page = memory.forbid(5, 1)
        assert vm.region(page, PAGE) == 0, "to read is enough"
        memory.forbid(5)
        assert vm.region(memory.address, memory.size) == vm.region(page, PAGE) == ENOMEM
        assert vm.update(memory.address, 5 * PAGE)[0] != 0


def test_a_hole_in_the_middle(vm: Sev) -> None:
    vm.to("init")
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    pages = libc.mmap(None, ctypes.c_size_t(9 * PAGE), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    try:
        assert vm.region(pages, 9 * PAGE) == 0
        libc.munmap(ctypes.c_void_p(pages + 4 * PAGE), ctypes.c_size_t(PAGE))
        assert vm.region(pages, 9 * PAGE) == ENOMEM and vm.region(pages, 4 * PAGE) == vm.region(pages + 5 * PAGE, 4 * PAGE) == 0
    finally:
        libc.munmap(ctypes.c_void_p(pages), ctypes.c_size_t(9 * PAGE))


def test_the_pin_limit(vm: Sev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.host, "memlock_limit", lambda: 4 * PAGE + 100)
    vm.to("started")
    assert vm.region(vm.hva, 5 * PAGE) == ENOMEM and vm.region(vm.hva, 3 * PAGE) == 0
    assert vm.region(vm.hva, 2 * PAGE) == ENOMEM, "registered pages count"
    assert vm.region(vm.hva + PAGE - 1, 2) == ENOMEM, "two bytes, two pages"
    assert vm.update(vm.hva, 2 * PAGE) == (ENOMEM, UNTOUCHED) and vm.update(vm.hva, PAGE) == vm.update(vm.hva, PAGE) == (0, 0)
    assert vm.region(vm.hva, 3 * PAGE, undo=True) == 0 and vm.region(vm.hva, 4 * PAGE) == 0


def test_each_vm_counts_for_itself(vm: Sev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.host, "memlock_limit", lambda: 2 * PAGE)
    with Sev(vm.host) as other:
        for each in (vm, other):
            each.to("init")
            assert each.region(each.hva, 2 * PAGE) == 0 and each.region(each.hva, 1) == ENOMEM


def test_pins_move_and_mirrors_have_none(vm: Sev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.host, "memlock_limit", lambda: 4 * PAGE)
    vm.to("started")
    assert vm.region(vm.hva, 3 * PAGE) == 0
    with Sev(vm.host) as mirror, Sev(vm.host) as target:
        assert mirror.copy(vm) == 0
        assert mirror.region(mirror.hva, PAGE) == mirror.region(mirror.hva, PAGE, undo=True) == EINVAL
        assert target.move(vm) == 0
        assert target.region(target.hva, 2 * PAGE) == ENOMEM and target.region(target.hva, PAGE) == 0, "three came along"
        assert target.region(vm.hva, 3 * PAGE, undo=True) == 0 and target.region(target.hva, 3 * PAGE) == 0


def test_a_region_outlives_nothing(model_host: Any) -> None:
    """Registered and never unregistered: the VM's end gives it back, and the next VM of the same machine starts from
    zero.
    """
    for _ in range(3):
        with Sev(model_host) as vm:
            vm.to("started")
            assert vm.region(vm.hva, 16 * PAGE) == 0
    assert model_host.platform.firmware.guest_count == 0


def test_unregistering_leaves_the_memory_encrypted(vm: Sev) -> None:
    vm.put(0, b"plain" * 100)
    vm.to("started")
    assert vm.region(vm.hva, PAGE) == 0 and vm.update() == (0, 0)
    before = vm.get(0, PAGE)
    assert vm.region(vm.hva, PAGE, undo=True) == 0 and vm.get(0, PAGE) == before
    assert b"plain" not in before and vm.state() == sev.SEV_STATE_LAUNCH_UPDATE
