"""System calls about this process's own memory, and waiting: the tools of the guest_memfd and memslot suites."""

from __future__ import annotations

import mmap
import os
import signal

import pytest

from vmm.selftests import hostmem
from vmm.selftests.case import Skip
from vmm.selftests.checks import Failure, signal_of
from vmm.selftests.waiting import wait_until

PAGE = 4096


def test_pages_are_on_nodes() -> None:
    with mmap.mmap(-1, 3 * PAGE) as view:
        view[: 2 * PAGE] = b"x" * (2 * PAGE)
        found = hostmem.nodes_of(hostmem.address_of(view), 3)
        assert set(found[:2]) <= set(hostmem.nodes()) and found[2] < 0, "the third page was never touched"


def test_policies_are_read_back() -> None:
    with mmap.mmap(-1, PAGE) as view:
        address, node = hostmem.address_of(view), hostmem.nodes()[0]
        try:
            hostmem.mbind(address, PAGE, hostmem.MPOL_BIND, [node])
        except Skip as reason:
            pytest.skip(str(reason))
        assert hostmem.get_mempolicy(address) == (hostmem.MPOL_BIND, [node])
        with pytest.raises(OSError):
            hostmem.mbind(address, PAGE, 999, [node])


def test_a_mapping_may_be_longer_than_its_file() -> None:
    fd = os.memfd_create("short")
    try:
        os.ftruncate(fd, PAGE)
        view = hostmem.Overlong(fd, 2 * PAGE)
        view[0:4] = b"data"
        assert view[0:4] == b"data" == os.pread(fd, 4, 0)
        assert signal_of(lambda: view[PAGE : PAGE + 1]) == signal.SIGBUS
        with pytest.raises(ValueError, match="do not fill"):
            view[0:4] = b"toolong"
        view.close()
        view.close()
    finally:
        os.close(fd)


def test_waiting_ends() -> None:
    turns = iter((False, False, True))
    wait_until(lambda: next(turns), 10, "the third turn")
    with pytest.raises(Failure, match=r"^pigs fly: not within 0\.01 s$"):
        wait_until(lambda: False, 0.01, "pigs fly")
