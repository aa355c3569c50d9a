"""`Descriptor`: what all objects over an fd share. It closes once, and it turns a failing ioctl into a `KvmError`.

Two calls: `ioctl` raises with words, `ioctl_raw` gives the number or -errno, for tests that want the error itself.
The table is only looked at when something failed.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import ClassVar, Self

from kvmapi.abi.encoding import decode_request
from kvmapi.errors import KvmError, call_error, ioctl_error
from kvmapi.host import Host
from kvmapi.rows import Argument, On
from kvmapi.table import row
from kvmapi.words import errno_words


class Descriptor:
    """An fd of a host. `fd` is -1 once it is closed."""

    on: ClassVar[On] = "system"

    def __init__(self, host: Host, fd: int) -> None:
        self.host = host
        self.fd = fd

    def close(self) -> None:
        """Close the fd; safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.host.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"fd {self.fd}" if self.fd >= 0 else "closed"
        return f"<{type(self).__name__} {state} on {self.host.name}>"

    def ioctl_raw(self, request: int, arg: int = 0) -> int:
        """The result of an ioctl, or -errno; never raises. `arg` is a value or an address."""
        return self.host.ioctl(self.fd, request, arg)

    def ioctl(self, request: int, argument: Argument = None) -> int:
        """The result of an ioctl; raises `KvmError`. A struct is passed by address and written back in place."""
        if argument is None:
            value = 0
        elif isinstance(argument, int):
            value = argument
        else:
            value = ctypes.addressof(argument)
        result = self.host.ioctl(self.fd, request, value)
        if result < 0:
            raise self.error(request, -result, argument)
        return result

    def error(self, request: int, code: int, argument: Argument = None) -> KvmError:
        """The error that `request` on this fd would raise; for callers of `ioctl_raw`."""
        known = row(self.on, request)
        if known is not None:
            return ioctl_error(known, code, argument)
        return KvmError(
            f"{decode_request(request)} on a {self.on} fd",
            code,
            hint=f"the table knows no such ioctl on this kind of fd: {errno_words(code)}",
        )

    def call_error(self, call: str, error: OSError, **arguments: object) -> KvmError:
        """The error of another system call on this fd."""
        return call_error(call, error.errno or 0, arguments)
