"""Overwriting transient copies of keys before they are dropped: freed heap memory keeps its contents, and a core dump has it."""

from __future__ import annotations

import ctypes

_BYTES_HEAD = bytes.__basicsize__ - 1  # where the contents of a bytes object begin


def wipe(data: bytes | bytearray) -> None:
    """Overwrite a transient copy of a secret. The caller holds the only reference and drops it now.

    Python has no way to say this of `bytes`; that they are immutable is a promise to those who still read them. Shorter
    than two bytes are shared by the whole interpreter and left alone.

    >>> key = bytes([1, 2, 3])
    >>> wipe(key)
    >>> key
    b'\\x00\\x00\\x00'
    """
    if isinstance(data, bytearray):
        data[:] = bytes(len(data))
    elif len(data) > 1:
        ctypes.memset(id(data) + _BYTES_HEAD, 0, len(data))
