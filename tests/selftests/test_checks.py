"""The assertions: they pass where they should, and their failures say what came and what should have come."""

from __future__ import annotations

import errno
import mmap
import os
import signal

import pytest

from kvmapi.abi import psp
from kvmapi.errors import KvmError
from vmm.selftests.api import Failure, Skip, check_equal, check_result, expect_errno, expect_firmware, fail, signal_of, skip


def test_expect_errno() -> None:
    with expect_errno(errno.EINVAL, errno.EEXIST):
        raise OSError(errno.EEXIST, "there already")
    with pytest.raises(Failure, match="expected EINVAL, got EEXIST"), expect_errno(errno.EINVAL):
        raise KvmError("KVM_X", errno.EEXIST)
    with pytest.raises(Failure, match="expected EINVAL, but the call succeeded"), expect_errno(errno.EINVAL):
        pass
    with pytest.raises(KeyError), expect_errno(errno.EINVAL):
        raise KeyError("not an error of a system call")


def test_expect_firmware() -> None:
    with expect_firmware(psp.SEV_RET_POLICY_FAILURE):
        raise KvmError("KVM_SEV_DBG_DECRYPT", errno.EIO, fw_error=psp.SEV_RET_POLICY_FAILURE)
    for error in (
        KvmError("X", errno.EIO, fw_error=psp.SEV_RET_INVALID_LEN),
        KvmError("X", errno.EINVAL, fw_error=psp.SEV_RET_POLICY_FAILURE),
    ):
        with (
            pytest.raises(Failure, match=r"expected EIO with firmware status .*POLICY_FAILURE.*got: X"),
            expect_firmware(psp.SEV_RET_POLICY_FAILURE),
        ):
            raise error
    with pytest.raises(Failure, match="the command succeeded"), expect_firmware(psp.SEV_RET_POLICY_FAILURE):
        pass


def test_check_result() -> None:
    check_result(-errno.EFAULT, -errno.EFAULT, "it")
    with pytest.raises(Failure, match="it: 5, expected -EFAULT"):
        check_result(5, -errno.EFAULT, "it")
    with pytest.raises(Failure, match="it: -EPERM, expected 0"):
        check_result(-errno.EPERM, 0, "it")


def test_check_equal_shows_the_first_difference_of_long_bytes_only() -> None:
    check_equal(b"x" * 5000, b"x" * 5000, "it")
    other = bytearray(b"x" * 5000)
    other[0x100] = other[0x200] = 0
    with pytest.raises(Failure) as caught:
        check_equal(b"x" * 5000, other, "it")
    assert str(caught.value).startswith("it: 2 of 5000 bytes differ, the first at 0x100: 78 78") and len(str(caught.value)) < 200
    with pytest.raises(Failure, match="it: 0x1000, expected 3"):
        check_equal(0x1000, 3, "it")


def test_skip_and_fail() -> None:
    with pytest.raises(Skip, match="why"):
        skip("why")
    with pytest.raises(Failure, match="why"):
        fail("why")


def test_signal_of_makes_the_call_in_a_child_and_writes_reach_shared_mappings() -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGBUS)

    def refuse() -> None:
        raise ValueError("no")

    page = mmap.mmap(-1, 4096)
    assert signal_of(die) == signal.SIGBUS
    assert signal_of(refuse) == -1
    assert signal_of(lambda: page.__setitem__(0, 7)) == 0
    assert page[0] == 7
