"""What a test asserts with, besides `assert`: errors of system calls, firmware answers, signals, memory.

Each failure is an AssertionError whose text says what was tried, what came and what should have come.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmapi.abi import psp
from kvmapi.errors import KvmError
from vmm.selftests.case import Skip


class Failure(AssertionError):
    """An expectation of a test did not hold; the text is all there is to say."""


def skip(reason: str) -> None:
    """End this test (or subtest) as skipped; `reason` says what is missing and how to get it."""
    raise Skip(reason)


def fail(text: str) -> None:
    """End this test (or subtest) as failed."""
    raise Failure(text)


def _name(code: int | None) -> str:
    return errnos.errorcode.get(code or 0, str(code))


@contextmanager
def expect_errno(*codes: int) -> Iterator[None]:
    """The body must raise OSError (KvmError is one) with one of these errnos.

    >>> with expect_errno(errnos.EINVAL):
    ...     raise OSError(errnos.EINVAL, "no")
    """
    wanted = " or ".join(map(_name, codes))
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise Failure(f"expected {wanted}, got {_name(error.errno)}: {error}") from error
    else:
        raise Failure(f"expected {wanted}, but the call succeeded")


@contextmanager
def expect_firmware(status: int, errno: int = errnos.EIO) -> Iterator[None]:
    """The body must fail with the firmware's `status` (SEV_RET_*) and this errno."""
    wanted = f"{_name(errno)} with firmware status {psp.ret_name(status)}"
    try:
        yield
    except KvmError as error:
        if error.errno != errno or error.fw_error != status:
            raise Failure(f"expected {wanted}, got: {error}") from error
    else:
        raise Failure(f"expected {wanted}, but the command succeeded")


def check_result(result: int, expected: int, what: str) -> None:
    """`result` of an `ioctl_raw` (a number, or -errno) must be `expected`."""
    if result != expected:
        raise Failure(f"{what}: {_result(result)}, expected {_result(expected)}")


def _result(value: int) -> str:
    return f"-{_name(-value)}" if value < 0 else str(value)


def check_equal(actual: object, expected: object, what: str) -> None:
    """Two values must be equal; of long byte strings the first difference is told, never the whole."""
    if actual == expected:
        return
    if isinstance(actual, bytes | bytearray) and isinstance(expected, bytes | bytearray):
        raise Failure(f"{what}: {_difference(bytes(actual), bytes(expected))}")
    raise Failure(f"{what}: {_show(actual)}, expected {_show(expected)}")


def _show(value: object) -> str:
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9 else repr(value)


def _difference(actual: bytes, expected: bytes) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} bytes, expected {len(expected)}"
    at = next(i for i, (a, b) in enumerate(zip(actual, expected)) if a != b)
    count = sum(a != b for a, b in zip(actual, expected))
    is_, should = actual[at : at + 8].hex(" "), expected[at : at + 8].hex(" ")
    return f"{count} of {len(actual)} bytes differ, the first at {at:#x}: {is_}, expected {should}"


def signal_of(call: Callable[[], object]) -> int:
    """The signal that ends a child process in which `call` is made; 0 when it returns, and -1 when it raises.

    For what must kill a process, such as touching a private guest_memfd page (SIGBUS). The child shares the mappings, so what it
    writes through MAP_SHARED stays; it never returns into the test.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import faulthandler
            import resource

            faulthandler.disable()  # the signal is expected: no stacks on stderr
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            call()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    return -1 if os.WEXITSTATUS(status) else 0
