"""The MSR filter of a VM (KVM_X86_SET_MSR_FILTER): which MSRs the guest may read and write itself.

A filter is up to 16 ranges, each with a bitmap (1 allows, 0 denies) for reads, writes or both, and a default for what
no range names. The first range that holds an MSR for that kind of access decides. It concerns RDMSR and WRMSR of the
guest only, never KVM_GET_MSRS; the x2APIC range is exempt. What it denies exits with KVM_MSR_EXIT_REASON_FILTER where
KVM_CAP_X86_USER_SPACE_MSR asked for that, and is #GP otherwise. Source: arch/x86/kvm/msrs.c (7.3).
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple, Self

from kvmapi.abi import kvm
from kvmapi.model.caller import Caller, Errno

_FLAGS = struct.Struct("<I4x")
_RANGE = struct.Struct("<III4xQ")
SIZE = _FLAGS.size + kvm.KVM_MSR_FILTER_MAX_RANGES * _RANGE.size  # 392 bytes
_KINDS = kvm.KVM_MSR_FILTER_READ | kvm.KVM_MSR_FILTER_WRITE
_X2APIC = range(0x800, 0x900)


class Range(NamedTuple):
    """MSRs [base, base+msrs) for the kinds of access in `kinds`."""

    kinds: int
    base: int
    msrs: int
    bitmap: bytes


class MsrFilter:
    """One filter, immutable: a new one replaces it as a whole."""

    def __init__(self, default_allow: bool, ranges: list[Range]) -> None:
        self._default_allow = default_allow
        self._ranges = ranges

    @classmethod
    def from_caller(cls, arg: int, caller: Caller) -> Self:
        """The filter in struct kvm_msr_filter at `arg`. EFAULT: the struct or a bitmap cannot be read. EINVAL: unknown
        flags, a default that denies without any range, a range with no or unknown kinds of access, or with a bitmap of
        more than 0x600 bytes. Ranges without MSRs are skipped unchecked.
        """
        data = caller.memory.read(arg, SIZE)
        flags = _FLAGS.unpack_from(data)[0]
        rows = list(_RANGE.iter_unpack(data[_FLAGS.size :]))
        deny = bool(flags & kvm.KVM_MSR_FILTER_DEFAULT_DENY)
        if flags & ~kvm.KVM_MSR_FILTER_DEFAULT_DENY or (deny and not any(row[1] for row in rows)):
            raise Errno(errno.EINVAL)
        return cls(not deny, [_range(row, caller) for row in rows if row[1]])

    def allows(self, number: int, kind: int) -> bool:
        """May the guest do this (`kind`: KVM_MSR_FILTER_READ or _WRITE) to this MSR itself?"""
        if number in _X2APIC:
            return True
        for kinds, base, msrs, bitmap in self._ranges:
            # The kernel's end of a range is 32 bits: one that reaches beyond 2^32 holds nothing.
            if kinds & kind and base <= number < (base + msrs & 0xFFFFFFFF):
                return bool(bitmap[number - base >> 3] >> (number - base & 7) & 1)
        return self._default_allow


def _range(row: tuple[int, ...], caller: Caller) -> Range:
    kinds, msrs, base, address = row
    if kinds & ~_KINDS or not kinds:
        raise Errno(errno.EINVAL)
    size = (msrs + 63) // 64 * 8
    if size > kvm.KVM_MSR_FILTER_MAX_BITMAP_SIZE:
        raise Errno(errno.EINVAL)
    return Range(kinds, base, msrs, caller.memory.read(address, size))
