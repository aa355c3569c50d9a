"""Two machines with the same layout, one of the model and one of a real kernel, and every step done to both.

    with Pair(kernel, model, Machine) as pair:
        pair.ioctl("vm", "KVM_SET_USER_MEMORY_REGION", slot=1, guest_phys_addr=0x200000, memory_size=4096, userspace_addr=Here(0))
        pair.see("regs", lambda side: bytes(side.vcpu.get_regs()))

A step gives the same number or errno and the same bytes on both sides, or it is a difference. A difference that a rule
of `known.py` explains is forgiven; where it leaves the two in different states the pair is `settled` and the rest of
the sequence is not judged. Any other is a `Disagreement`, whose text is the whole sequence as ioctls by name, in the
form in which the steps were written.

Numbers that differ from side to side (addresses, fds) are written as `Here` and `File`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from kvmapi.exits import Exit, InternalError
from kvmapi.host import Host
from kvmapi.table import named
from tests.conformance.snippets import Machine
from tests.differential import known


@dataclass(frozen=True)
class Here:
    """An address: `offset` bytes into the side's arena (in `memory` where the machine has none)."""

    offset: int

    def resolve(self, side: Any) -> int:
        return int(getattr(side, "arena_at", side.hva)) + self.offset

    def __repr__(self) -> str:
        return f"memory+{self.offset:#x}"


@dataclass(frozen=True)
class File:
    """The fd of the side's guest_memfd number `index`, open or closed; -1 where there is none."""

    index: int

    def resolve(self, side: Any) -> int:
        return int(side.files[self.index].fd) if self.index < len(side.files) else -1

    def __repr__(self) -> str:
        return f"guest_memfd {self.index}"


SURVEY: dict[str, list[str]] | None = {} if os.environ.get("SEVMM_SURVEY") == "1" else None
"""With SEVMM_SURVEY=1 no disagreement fails: each is kept here under its last line, and the session prints them all."""


class Disagreement(AssertionError):
    """The model and the kernel differ, and no rule says that they may."""


@dataclass(frozen=True)
class Step:
    """What was done and what came back: for the rules. `model` and `kernel` are errnos (negative), numbers or data."""

    what: str
    fields: dict[str, Any]
    model: Any
    kernel: Any


def _words(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 64 else f"{len(value)} bytes"
    if isinstance(value, int) and not isinstance(value, bool):
        if -4096 < value < 0:
            return f"-{errno.errorcode.get(-value, -value)}"
        return hex(value) if abs(value) > 9 else str(value)
    return repr(value)


def words_of(exit: Exit) -> str:
    """An exit as it is compared: of an internal error only its kind, because the data with it is for debugging."""
    return f"InternalError(suberror={exit.suberror})" if isinstance(exit, InternalError) else str(exit)


def apart(model: Any, kernel: Any) -> str:
    """Where two answers differ, in words."""
    if isinstance(model, dict) and isinstance(kernel, dict):
        keys = [key for key in {**model, **kernel} if model.get(key) != kernel.get(key)]
        return "; ".join(f"{key}: {apart(model.get(key), kernel.get(key))}" for key in keys)
    if isinstance(model, bytes) and isinstance(kernel, bytes) and len(model) == len(kernel) > 16:
        at = next(n for n in range(len(model)) if model[n] != kernel[n]) & -8
        return f"at byte {at:#x}: model {model[at : at + 16].hex()}, kernel {kernel[at : at + 16].hex()}"
    return f"model {_words(model)}, kernel {_words(kernel)}"


class Pair:
    """The two sides; `make` builds one on a host. Steps return what both sides gave (the kernel's, where they differ)."""

    def __init__(self, kernel: Host, model: Host, make: Callable[[Host], Any]) -> None:
        self.log: list[str] = []
        self.settled = ""
        self.kernel = make(kernel)
        try:
            self.model = make(model)
        except BaseException:
            self.kernel.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both sides."""
        self.model.__exit__()
        self.kernel.__exit__()

    @property
    def sides(self) -> tuple[Any, Any]:
        return self.model, self.kernel

    # ---- steps
    def ioctl(self, on: str, name: str, /, value: Any = None, **fields: Any) -> Any:
        """An ioctl of the table on the "system", "vm" or "vcpu" of both sides. `value` is a number, or makes the
        argument for a side; `fields` fill the row's struct. Compares result and, if the row writes it, the struct.
        """
        row = named(name, on)

        def do(side: Machine) -> Any:
            argument = value(side) if callable(value) else value
            if row.struct is not None and argument is None:
                argument = row.struct(**{key: _resolve(item, side) for key, item in fields.items()})
            number = argument if isinstance(argument, int) else 0 if argument is None else ctypes.addressof(argument)
            result = getattr(side, on).ioctl_raw(row.number, number)
            if result >= 0 and row.writes and not isinstance(argument, int):
                return fields_of(argument)
            return result

        said = ", ".join(f"{key}={_words(item)}" for key, item in fields.items())
        if not callable(value) and value is not None:
            said = _words(value)
        return self.see(f"{name}({said})", do, what=name, fields=fields)

    def see(self, words: str, do: Callable[[Any], Any], *, what: str = "", fields: dict[str, Any] | None = None) -> Any:
        """Do something to both sides and compare what it returns."""
        if self.settled:
            return None
        model, kernel = do(self.model), do(self.kernel)
        if model == kernel:
            self.log.append(f"{words} = {'the same' if isinstance(kernel, dict) else _words(kernel)}")
            return kernel
        self.log.append(f"{words}: {apart(model, kernel)}")
        rule = known.rule_for(Step(what or words, fields or {}, model, kernel), self.kernel)
        if rule is None:
            if SURVEY is None:
                raise Disagreement("\n".join(["the model and the kernel differ:", *self.log]))
            SURVEY.setdefault(self.log[-1], list(self.log))
            self.settled = "surveyed"
        elif rule.ends:
            self.settled = rule.name
        return kernel


def _resolve(value: Any, side: Any) -> Any:
    if isinstance(value, Here | File):
        return value.resolve(side)
    return value


def fields_of(struct: Any) -> dict[str, Any]:
    """A struct, or nested structs, as a flat dict of numbers and bytes: what is compared and printed field by field."""
    found: dict[str, Any] = {}
    for field in struct._fields_:
        value = getattr(struct, field[0])
        if isinstance(value, ctypes.Array):
            found[field[0]] = bytes(value)
        elif isinstance(value, ctypes.Structure):
            found.update({f"{field[0]}.{key}": inner for key, inner in fields_of(value).items()})
        elif isinstance(value, ctypes.Union):
            found[field[0]] = bytes(value)
        else:
            found[field[0]] = value
    return found
