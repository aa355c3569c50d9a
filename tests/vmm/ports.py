"""Calls of port handlers as the run loop makes them."""

from __future__ import annotations

from vmm.devices import PortHandler


def read(handler: PortHandler, port: int, size: int = 1, count: int = 1) -> bytes:
    """IN: what the guest gets."""
    data = bytearray(b"\xa5" * size * count)
    handler(port, size, count, memoryview(data), False)
    return bytes(data)


def write(handler: PortHandler, port: int, value: int, size: int = 1) -> None:
    """OUT of one item."""
    handler(port, size, 1, memoryview(bytearray(value.to_bytes(size, "little"))), True)
