"""Structs that are right but for one field: lengths that are too short or too long, pointers to where nothing is, or something else.

A `Twist` names a field and one of a few wrong values, so two small numbers say what is wrong with a call and 0, 0 says nothing is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.model.sev_arena import PAGE, SCRATCH, Arena

DATA = 0x100
"""Where the command's struct stands in scratch."""


class Twist(NamedTuple):
    """`field` 0: nothing is wrong; 1: where the command struct stands; 2: where the command's struct stands; from 3: one of its fields."""

    field: int = 0
    value: int = 0


STRAIGHT = Twist()
VALUES = 8
_LENGTHS: tuple[Callable[[int], int], ...] = (
    lambda right: 0,
    lambda right: right - 1,
    lambda right: right + 1,
    lambda right: right + 16,
    lambda right: 0x4000,
    lambda right: 0x4001,
    lambda right: 0xFFFF_FFF0,
    lambda right: 8,
)
_BITS = (1, 2, 0xFFFF, 0x8000)


def strange(arena: Arena, where: int) -> tuple[int, ...]:
    """`VALUES` addresses: null, a hole, the edge of one, read-only, the kernel's, the end of all, across pages, the struct itself."""
    return (0, arena.hole, arena.scratch + SCRATCH - 8, arena.readonly, 1 << 63, (1 << 64) - 16, arena.guest[0] + 4090, where)


def elsewhere(arena: Arena, where: int) -> tuple[int, ...]:
    """The same for a struct that the kernel writes back: never into memory that a guest may be about to encrypt."""
    return (*strange(arena, where)[:6], arena.scratch + SCRATCH - PAGE - 6, where)


def place(arena: Arena, data: Any, twist: Twist) -> int:
    """Put a command's struct into scratch, with what the twist makes of it; where the command is told that it stands."""
    where = arena.scratch + DATA
    names = [name for name, kind, *_ in data._fields_ if not name.startswith("pad") and issubclass(kind, ctypes._SimpleCData)]
    if twist.field > 2 and names:
        name = names[(twist.field - 3) % len(names)]
        setattr(data, name, _twisted(arena, name, getattr(data, name), twist.value, where))
    arena.write(where, bytes(data))
    return elsewhere(arena, where)[twist.value] if twist.field == 2 else where


def _twisted(arena: Arena, name: str, right: int, value: int, where: int) -> int:
    if name.endswith("len"):
        return _LENGTHS[value](right) & 0xFFFF_FFFF
    if name.endswith("addr"):
        return strange(arena, where)[value]
    if name == "size":
        return (0, right + 1, (1 << 64) - 1, 1 << 40)[value % 4]
    return right ^ _BITS[value % 4]
