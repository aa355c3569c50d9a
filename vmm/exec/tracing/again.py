"""Calls that a signal has ended before anybody received them.

Between a trapped call and the moment at which we receive it a signal may come. The kernel then gives the call up as one that
can be made again: it is, where the handler has SA_RESTART, and fails with EINTR where not. But most of the calls that
are handed to us never fail so without us, and nobody is prepared for it. Of a program that is traced we see the signal
first, and have such a call made again in any case. It has not begun, so nothing is done twice.

KVM_RUN is left alone: a signal ends it with EINTR. So are opens, of which some do wait without us (FIFOs).
"""

from __future__ import annotations

from kvmapi.abi import ioctls
from vmm.exec import filter as calls
from vmm.exec.tracing.ptrace import Registers

_IF_RESTART, _ALWAYS = -512, -513  # ERESTARTSYS, ERESTARTNOINTR
_NEVER_INTERRUPTED = frozenset((*calls.ASKS, calls.FSTAT, calls.MMAP, calls.MREMAP, calls.MADVISE, calls.EXECVE, calls.EXECVEAT))
_U32, _U64 = 0xFFFFFFFF, (1 << 64) - 1


def make_again(registers: Registers) -> bool:
    """The registers of a thread before the delivery of a signal: was it in such a call? Then they say now that it is made again."""
    if registers.rax != _IF_RESTART & _U64:
        return False
    number, request = registers.orig_rax, registers.rsi & _U32
    ours = number == calls.IOCTL and (request == calls.SEV_ISSUE_CMD or (request >> 8 & 0xFF == calls.KVMIO and request != ioctls.KVM_RUN))
    if ours or number in _NEVER_INTERRUPTED:
        registers.rax = _ALWAYS & _U64
        return True
    return False
