"""The table: one row per ioctl and kind of fd, and lookups in it.

    >>> from kvmapi.abi.ioctls import KVM_SET_USER_MEMORY_REGION
    >>> row("vm", KVM_SET_USER_MEMORY_REGION).name
    'KVM_SET_USER_MEMORY_REGION'
    >>> row("vcpu", KVM_SET_USER_MEMORY_REGION) is None
    True

The rows themselves are in `table_system`, `table_vm`, `table_vcpu` and `table_sev`; what a row can do is in
`rows`. A guest_memfd has no ioctls of its own (it takes fallocate and mmap), so no row names it.
"""

from __future__ import annotations

from kvmapi.abi.psp import SEV_ISSUE_CMD
from kvmapi.rows import ArgKind, Command, Ioctl, On, decode_argument, decode_struct
from kvmapi.table_sev import GUEST_COMMANDS, PLATFORM_COMMANDS, SEV
from kvmapi.table_system import DEVICE, SYSTEM
from kvmapi.table_vcpu import VCPU
from kvmapi.table_vm import VM

__all__ = [
    "ArgKind",
    "Command",
    "Ioctl",
    "On",
    "any_row",
    "command",
    "commands",
    "decode_argument",
    "decode_struct",
    "named",
    "row",
    "rows",
    "table_names",
]

_ROWS: tuple[Ioctl, ...] = SYSTEM + VM + VCPU + DEVICE + SEV
_BY_KEY: dict[tuple[str, int], Ioctl] = {(r.on, r.number): r for r in _ROWS}
_BY_NUMBER: dict[int, Ioctl] = {r.number: r for r in reversed(_ROWS)}


def rows(on: On | None = None) -> tuple[Ioctl, ...]:
    """All rows, or those of one kind of fd."""
    return _ROWS if on is None else tuple(r for r in _ROWS if r.on == on)


def row(on: str, number: int) -> Ioctl | None:
    """The row of request `number` on that kind of fd; None if this fd knows no such request.

    Only the low 32 bits count, as in the kernel: a request that a C program passed as a negative int is found.
    """
    return _BY_KEY.get((on, number & 0xFFFF_FFFF))


def any_row(number: int) -> Ioctl | None:
    """The first row with this request number on whatever kind of fd: for traces of unknown fds."""
    return _BY_NUMBER.get(number & 0xFFFF_FFFF)


def named(name: str, on: str | None = None) -> Ioctl:
    """The row with this name (on that kind of fd, if several have it). Raises KeyError."""
    for r in _ROWS:
        if r.name == name and on in (None, r.on):
            return r
    raise KeyError(name if on is None else f"{name} on {on}")


def command(request: int, number: int) -> Command | None:
    """The row of command `number` inside KVM_MEMORY_ENCRYPT_OP or SEV_ISSUE_CMD (`request` says which)."""
    commands = PLATFORM_COMMANDS if request & 0xFFFF_FFFF == SEV_ISSUE_CMD else GUEST_COMMANDS
    return commands.get(number)


def commands(request: int) -> tuple[Command, ...]:
    """All commands inside one of the two multiplexing ioctls."""
    return tuple((PLATFORM_COMMANDS if request & 0xFFFF_FFFF == SEV_ISSUE_CMD else GUEST_COMMANDS).values())


def table_names() -> frozenset[str]:
    """Names of all ioctls and commands: what `KvmError.ioctl` may say for an ioctl."""
    commands = (*GUEST_COMMANDS.values(), *PLATFORM_COMMANDS.values())
    return frozenset(r.name for r in _ROWS) | frozenset(c.name for c in commands)
