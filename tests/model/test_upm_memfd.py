"""Memfds with MFD_INACCESSIBLE: what user space can do with one, and that it never sees inside."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmapi.abi import dialects as d
from kvmapi.dialects import PrivateMemfd
from kvmapi.errors import KvmError
from kvmapi.exits import Hlt
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import PAGE
from tests.model.upm import AT, MARK, PAT, Upm, host

pytestmark = pytest.mark.model
KEEP, PUNCH = 1, 3


def refusal(call: Callable[..., Any], *arguments: Any) -> int:
    """The errno of a call that must fail."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


@pytest.fixture
def machine() -> ModelHost:
    return host("upm-v6")


@pytest.fixture
def file(machine: ModelHost) -> Iterator[PrivateMemfd]:
    with PrivateMemfd.create(machine) as made:
        yield made


@pytest.mark.parametrize("flags", [d.MFD_ALLOW_SEALING, d.MFD_HUGETLB, 0x10, 1 << 20])
def test_flags_that_do_not_go_with_it(machine: ModelHost, flags: int) -> None:
    assert refusal(machine.memfd_create, "x", d.MFD_INACCESSIBLE | flags) == errno.EINVAL


def test_other_memfds_are_what_they_were(machine: ModelHost) -> None:
    fd = machine.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(fd, b"seen")
    assert os.pread(fd, 4, 0) == b"seen"
    machine.close(fd)


def test_mainline_takes_the_flag_for_another_one() -> None:
    machine = host("mainline")
    fd = machine.memfd_create("x", d.MFD_INACCESSIBLE)  # MFD_NOEXEC_SEAL
    os.write(fd, b"seen")
    assert os.pread(fd, 4, 0) == b"seen"
    machine.close(fd)


@pytest.mark.parametrize("flags", [0, os.MFD_CLOEXEC])
def test_close_on_exec_is_the_callers_choice(machine: ModelHost, flags: int) -> None:
    fd = machine.memfd_create("x", d.MFD_INACCESSIBLE | flags)
    assert os.get_inheritable(fd) is (flags == 0)
    machine.close(fd)


def test_nobody_reads_writes_or_maps_it(machine: ModelHost, file: PrivateMemfd) -> None:
    file.allocate(0, 2 * PAGE)
    assert refusal(os.write, file.fd, b"x") == errno.EPERM
    assert refusal(os.pwrite, file.fd, b"x", 0) == errno.EPERM
    assert refusal(os.pread, file.fd, 1, 0) == errno.EBADF
    assert refusal(machine.mmap, file.fd, PAGE) == errno.EPERM
    assert refusal(mmap.mmap, file.fd, PAGE) in (errno.EPERM, errno.EACCES)
    assert refusal(mmap.mmap, file.fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ) in (errno.EPERM, errno.EACCES)


class TestSize:
    def test_once(self, machine: ModelHost, file: PrivateMemfd) -> None:
        assert refusal(file.resize, PAGE + 1) == errno.EINVAL
        file.resize(0)
        file.resize(2 * PAGE)
        assert os.fstat(file.fd).st_size == 2 * PAGE
        for size in (0, PAGE, 2 * PAGE, 4 * PAGE):
            assert refusal(file.resize, size) == errno.EPERM
        for size in (0, PAGE, 4 * PAGE):
            assert refusal(os.ftruncate, file.fd, size) == errno.EPERM

    def test_by_the_system_call_itself(self, file: PrivateMemfd) -> None:
        os.ftruncate(file.fd, 4 * PAGE)
        file.allocate(PAGE, PAGE)  # the model looks
        assert refusal(os.ftruncate, file.fd, 8 * PAGE) == errno.EPERM
        assert os.fstat(file.fd).st_size == 4 * PAGE

    def test_by_the_first_allocation(self, file: PrivateMemfd) -> None:
        file.allocate(0, 2 * PAGE)
        assert os.fstat(file.fd).st_size == 2 * PAGE
        assert refusal(file.allocate, 0, 4 * PAGE) == errno.EPERM
        file.allocate(PAGE, PAGE)

    def test_of_half_a_page(self, machine: ModelHost, file: PrivateMemfd) -> None:
        assert refusal(file.allocate, 0, PAGE + 8) == errno.EINVAL
        os.ftruncate(file.fd, 100)
        assert refusal(file.allocate, 0, PAGE) == errno.EINVAL

    def test_of_terabytes_costs_nothing(self, file: PrivateMemfd) -> None:
        file.resize(1 << 42)
        file.allocate(0, 1 << 42)
        file.punch_hole(PAGE, 1 << 41)


@pytest.mark.parametrize(
    ("mode", "offset", "length", "number"),
    [
        (0, -1, PAGE, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (0, 1 << 62, 1 << 62, errno.EFBIG),
        (2, 0, PAGE, errno.EOPNOTSUPP),
        (0x10, 0, PAGE, errno.EOPNOTSUPP),
        (0x100, 0, PAGE, errno.EOPNOTSUPP),
        (PUNCH, 1, PAGE, errno.EINVAL),
        (PUNCH, 0, PAGE + 1, errno.EINVAL),
    ],
)
def test_what_fallocate_refuses(machine: ModelHost, file: PrivateMemfd, mode: int, offset: int, length: int, number: int) -> None:
    file.resize(2 * PAGE)
    assert refusal(machine.fallocate, file.fd, mode, offset, length) == number


def test_what_fallocate_takes(machine: ModelHost, file: PrivateMemfd) -> None:
    file.resize(2 * PAGE)
    machine.fallocate(file.fd, KEEP, 0, 8 * PAGE)  # beyond the end: nobody can get there
    machine.fallocate(file.fd, PUNCH, 0, 8 * PAGE)
    machine.fallocate(file.fd, 0, 100, 100)  # a part of a page is the page
    assert os.fstat(file.fd).st_size == 2 * PAGE


def test_it_has_no_ioctls(machine: ModelHost, file: PrivateMemfd) -> None:
    assert machine.ioctl(file.fd, 0xAE80) == -errno.ENOTTY


def test_it_lives_while_a_slot_has_it(no_leaks: None) -> None:
    with Upm(host("upm-v6")) as guest:
        guest.memfd.allocate(0, PAGE)
        assert guest.says(AT, 1, MARK) == 0
        assert guest.store(PAT) == Hlt()
        guest.memfd.close()
        assert guest.value() == PAT
        guest.vm.set_user_memory_region(10, AT, 0, 0)


def test_errors_are_words(file: PrivateMemfd) -> None:
    file.resize(PAGE)
    with pytest.raises(KvmError, match="fallocate"):
        file.punch_hole(1, PAGE)
