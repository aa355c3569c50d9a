"""Arguments that are a header followed by entries, in one piece of memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

H = TypeVar("H", bound=ctypes.Structure)


class HeaderAndEntries(Generic[H]):
    """`header` and `entries` share one buffer, as the kernel wants them; keep this object alive during the call.

    >>> from kvmapi.abi.vcpu import kvm_msr_entry, kvm_msrs
    >>> b = HeaderAndEntries(kvm_msrs, kvm_msr_entry, 2)
    >>> b.header.nmsrs = 2
    >>> b.entries[1].index = 0x10
    >>> bytes(b.buffer)[24:28].hex()
    '10000000'
    """

    def __init__(self, header: type[H], entry: Any, count: int) -> None:
        start = ctypes.sizeof(header)
        self.buffer = bytearray(start + count * ctypes.sizeof(entry))
        self.header: H = header.from_buffer(self.buffer)
        self.entries: Sequence[Any] = (entry * count).from_buffer(self.buffer, start)
