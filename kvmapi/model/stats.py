"""Statistics of a VM or a vCPU, and the file that KVM_GET_STATS_FD opens (Documentation/virt/kvm/api.rst, 4.133).

The file says itself what is in it: a header, an id, one descriptor for each statistic, and the numbers. It is read with
read and pread, which no seam of ours sees; so the counters live in the file. It is a memfd, made when somebody first asks,
and each fd of it is an open file of its own, for reading only. It stays readable after its VM is gone.

Only what the model counts is listed: a reader finds statistics by name, and one that is absent is told from one that is 0.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvmapi.model.files import File
from kvmapi.model.placeholder import StandIn

if TYPE_CHECKING:
    from kvmapi.model.caller import Caller

_CUMULATIVE, _INSTANT = 0, 1  # type
_NO_UNIT, _SECONDS, _BOOLEAN = 0 << 4, 2 << 4, 4 << 4
NAME_SIZE = 48
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x10  # SEAL, SHRINK, GROW, FUTURE_WRITE: whoever opens the fd anew changes nothing either
_HEADER = struct.Struct("<6I")  # kvm_stats_header
_DESCRIPTOR = struct.Struct(f"<IhHII{NAME_SIZE}s")  # kvm_stats_desc: flags, exponent, size, offset, bucket size, name


class Statistic(NamedTuple):
    """One number: its name in KVM's list, its kind, and the power of ten of its unit."""

    name: str
    flags: int = _CUMULATIVE | _NO_UNIT
    exponent: int = 0


EXITS, SIGNAL_EXITS, HALT_EXITS, IRQ_INJECTIONS, NMI_INJECTIONS, HALT_WAKEUP, HALT_WAIT_NS, BLOCKING = range(8)
OF_VCPU = (
    Statistic("exits"),
    Statistic("signal_exits"),
    Statistic("halt_exits"),
    Statistic("irq_injections"),
    Statistic("nmi_injections"),
    Statistic("halt_wakeup"),
    Statistic("halt_wait_ns", _CUMULATIVE | _SECONDS, -9),
    Statistic("blocking", _INSTANT | _BOOLEAN),
)
REMOTE_TLB_FLUSH = 0
OF_VM = (Statistic("remote_tlb_flush"),)


class Stats:
    """The counters of one VM or vCPU: `counters[HALT_EXITS] += 1`. `identity` names it in the file."""

    def __init__(self, identity: str, statistics: tuple[Statistic, ...]) -> None:
        self.identity = identity
        self._statistics = statistics
        self.counters: list[int] | memoryview = [0] * len(statistics)
        self._fd = -1
        self._map: mmap.mmap | None = None

    def open(self) -> StatsFile:
        """A file to hand out. Nobody counts meanwhile. Raises OSError."""
        if self._fd < 0:
            self._make()
        return StatsFile(self._fd)

    def give(self, arg: int, caller: Caller) -> int:
        """KVM_GET_STATS_FD."""
        return caller.install(self.open())

    def _make(self) -> None:
        at = _HEADER.size + NAME_SIZE + len(self._statistics) * _DESCRIPTOR.size
        data = _HEADER.pack(0, NAME_SIZE, len(self._statistics), _HEADER.size, _HEADER.size + NAME_SIZE, at)
        data += self.identity.encode().ljust(NAME_SIZE, b"\0")
        for number, (name, flags, exponent) in enumerate(self._statistics):
            data += _DESCRIPTOR.pack(flags, exponent, 1, number * 8, 0, name.encode())
        data += struct.pack(f"<{len(self._statistics)}Q", *self.counters)
        fd = os.memfd_create(f"sevmm:{self.identity}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, data)
            self._map = mmap.mmap(fd, len(data))
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self.counters = fd, memoryview(self._map)[at:].cast("Q")

    def blocked(self, sleep: Callable[[], int | None]) -> int | None:
        """A vCPU sleeps in HLT while `sleep` lasts, which gives None where it woke."""
        since = time.monotonic_ns()
        self.counters[BLOCKING] = 1
        try:
            result = sleep()
        finally:
            self.counters[BLOCKING] = 0
        self.counters[HALT_WAIT_NS] += time.monotonic_ns() - since
        self.counters[HALT_WAKEUP] += result is None
        return result

    def destroy(self) -> None:
        """The VM or vCPU is gone; files that were handed out keep the last numbers."""
        if self._fd >= 0:
            self.counters = list(self.counters)
            os.close(self._fd)
            self._fd, self._map = -1, None


class StatsFile(File):
    """One file of statistics."""

    kind = "kvm-stats"

    def __init__(self, memfd: int) -> None:
        super().__init__()
        self._memfd = memfd

    def placeholder(self) -> int:
        return os.open(f"/proc/self/fd/{self._memfd}", os.O_RDONLY | os.O_CLOEXEC)

    def stand_in(self) -> StandIn:
        return StandIn(self.placeholder(), access=os.O_RDONLY)
