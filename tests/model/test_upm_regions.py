"""upm-v7: GPAs that user space registered are private, and a guest's accesses are private until it says otherwise."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmapi.abi import ioctls
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt, Hypercall
from tests.conformance.snippets import PAGE, address_of
from tests.model.upm import AT, CLR, ENCRYPTED, MARK, PAT, PAT2, Upm, fault, host

pytestmark = pytest.mark.model
GONE = 0xBAD000


@pytest.fixture
def v7() -> Iterator[Upm]:
    with Upm(host("upm-v7")) as made:
        yield made


def test_regions_decide(v7: Upm) -> None:
    v7.fill(PAT)
    assert v7.load() == fault(True)  # accesses of a private slot are private until the guest says otherwise
    assert v7.says(AT, 2, CLR) == 0
    assert v7.value() == PAT
    v7.vm.register_private(AT, PAGE)
    assert v7.load() == fault(False)
    assert v7.says(AT, 1, MARK) == 0
    assert v7.value() == 0  # a vCPU has run: nothing is copied any more
    assert v7.store(PAT2) == Hlt() and v7.word() == PAT
    assert v7.value(AT + PAGE) == PAT
    v7.memfd.punch_hole(0, PAGE)
    assert v7.value() == 0  # private still, and empty
    v7.vm.unregister_private(AT, PAGE)
    assert v7.load() == fault(True)


def test_regions_take_over_the_shared_half_before_the_first_run(v7: Upm) -> None:
    v7.fill(PAT)
    v7.vm.register_private(AT, PAGE)
    v7.fill(PAT2)
    assert v7.value() == PAT
    v7.vm.register_private(AT + PAGE, PAGE)
    assert v7.value(AT + PAGE) == 0


@pytest.mark.parametrize(("gpa", "size"), [(AT, 0), (AT + 1, PAGE), (AT, PAGE + 1), (AT, (1 << 64) - AT), (AT, (1 << 64) - PAGE)])
def test_regions_that_are_refused(v7: Upm, gpa: int, size: int) -> None:
    for request in (v7.vm.register_private, v7.vm.unregister_private):
        with pytest.raises(KvmError) as caught:
            request(gpa, size)
        assert caught.value.errno == errno.EINVAL
    assert v7.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, GONE) == -errno.EFAULT


def test_a_region_outside_of_private_slots(v7: Upm) -> None:
    memory, long = v7.mapping(1), v7.file(4 * PAGE)
    v7.vm.set_private_region(12, 3 * AT, PAGE, address_of(memory), long.fd)
    for gpa, size in ((0, PAGE), (2 * AT, PAGE), (AT, 4 * PAGE), (3 * AT, 2 * PAGE)):
        with pytest.raises(KvmError) as caught:
            v7.vm.register_private(gpa, size)  # nothing to take over there
        assert caught.value.errno == errno.EINVAL
    assert v7.says(AT, 2, MARK) == 0
    assert v7.value() == 0  # but private it is: that came first
    assert v7.run() == Hlt() and v7.value(0x100000) == 0  # and slots without private half go on as ever
    v7.vm.register_private(2 * AT, PAGE)


@pytest.mark.parametrize(("gpa", "pages"), [(AT, 0), (0, 1), (AT, 3), (2 * AT, 1)])
@pytest.mark.parametrize("attributes", [MARK, CLR, ENCRYPTED, 0])
def test_the_bitmap_of_a_slot_has_its_bounds(v7: Upm, gpa: int, pages: int, attributes: int) -> None:
    assert v7.says(gpa, pages, attributes) == -errno.EINVAL


def test_an_explicit_conversion_is_in_the_bitmap_before_the_exit(v7: Upm) -> None:
    v7.fill(PAT)
    exit = v7.say(AT, 2, 0)
    assert isinstance(exit, Hypercall) and exit.args[:3] == (AT, 2, 0)
    v7.vcpu.answer_hypercall(0)
    assert v7.run() == Hlt()
    assert v7.value() == PAT
    exit = v7.say(AT, 1, ENCRYPTED)
    assert isinstance(exit, Hypercall)
    v7.vm.register_private(AT, PAGE)
    assert v7.run() == Hlt() and v7.value() == 0


def test_a_file_that_is_too_short(v7: Upm) -> None:
    short, memory = v7.file(PAGE), v7.mapping(2)
    v7.vm.set_private_region(12, 2 * AT, 2 * PAGE, address_of(memory), short.fd)
    assert v7.value(0x100000) == 0
    v7.vm.register_private(2 * AT, 2 * PAGE)
    assert v7.value(2 * AT) == 0
    assert v7.load(2 * AT + PAGE) == fault(True, 2 * AT + PAGE)


def test_a_new_slot_begins_private(v7: Upm) -> None:
    assert v7.says(AT, 2, CLR) == 0 and v7.value() == 0
    v7.vm.set_user_memory_region(10, AT, 0, 0)
    v7.vm.set_private_region(10, AT, 2 * PAGE, address_of(v7.shared), v7.memfd.fd)
    assert v7.load() == fault(True)


@pytest.mark.parametrize("size", [0, 100, 1 << 62])
def test_a_file_that_can_have_no_memory(v7: Upm, size: int) -> None:
    """Sized by the system call after it was bound; the model finds out when the guest comes."""
    file, memory = v7.file(), v7.mapping(1)
    v7.vm.set_private_region(12, 2 * AT, PAGE, address_of(memory), file.fd)
    assert v7.value(0x100000) == 0
    v7.vm.register_private(2 * AT, PAGE)
    os.ftruncate(file.fd, size)
    assert v7.load(2 * AT) == fault(True, 2 * AT)
    if not size:
        os.ftruncate(file.fd, PAGE)
        assert v7.run() == Hlt()
