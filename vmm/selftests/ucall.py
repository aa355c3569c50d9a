"""The host's half of the ucall channel (guest/lib/ucall.h): what a guest says, as values.

Every vCPU has 64 bytes of the shared page: command, six arguments, answer, each u64. A command that is not 0 when the guest leaves by the
ucall port or by HLT is a ucall; reading it clears it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm import boot

if TYPE_CHECKING:
    from vmm.memory import GuestMemory

PORT = 0xFA
SLOT = struct.Struct("<8Q")
SYNC, DONE, ABORT = 1, 2, 3


@dataclass(frozen=True)
class Sync:
    """`ucall_sync(stage, ...)` of a vCPU; `args` are the five numbers after the stage."""

    stage: int
    args: tuple[int, ...]
    vcpu: int = 0


@dataclass(frozen=True)
class Done:
    """The vCPU's part is over: `ucall_done()`, or guest_main() returned `code` (0; anything else is a failure)."""

    vcpu: int = 0


@dataclass(frozen=True)
class Abort:
    """An assertion of the guest failed: at `line` of its text, with up to five numbers."""

    line: int
    args: tuple[int, ...]
    vcpu: int = 0


Ucall = Sync | Done | Abort


def take(memory: GuestMemory, vcpu: int, page: int = boot.SHARED_PAGE) -> Ucall | None:
    """The ucall that `vcpu` left in its slot, which is then free again; None where there is none. ValueError for an unknown command."""
    at = page + SLOT.size * vcpu
    command, *args, _ = SLOT.unpack(memory.read(at, SLOT.size))
    if command == 0:
        return None
    memory.write(at, bytes(8))
    if command == SYNC:
        return Sync(args[0], tuple(args[1:]), vcpu)
    if command == DONE:
        return Done(vcpu)
    if command == ABORT:
        return Abort(args[0], tuple(args[1:]), vcpu)
    raise ValueError(f"vCPU {vcpu} left the unknown ucall command {command:#x}")


def answer(memory: GuestMemory, vcpu: int, value: int, page: int = boot.SHARED_PAGE) -> None:
    """What the guest's ucall_sync() returns."""
    memory.write(page + SLOT.size * vcpu + 56, (value & (1 << 64) - 1).to_bytes(8, "little"))
