"""The one transaction that makes guest memory private or shared.

Explicit conversions (the guest asked by hypercall) and implicit ones (the guest touched a page and KVM reported a memory fault) come here,
and nowhere else does the map change after the launch. The order is fixed:

    check (before us: a `GpaRange` is a checked range) -> pending -> the steps of the backing -> map -> done

or, when a step fails, everything back: the steps that were done are undone in reverse order, the map was not touched yet, nothing is
recorded, and the caller gets `ConversionFailed` with the negative errno for the guest.

What the backing has to do differs by VM type, and so do the steps (`Backing.steps`):

- plain, SEV: nothing. SEV memory is pinned and encrypted in place, the C-bit is in the guest's own page tables; only our map changes;
- SW_PROTECTED: KVM_SET_MEMORY_ATTRIBUTES, and to-shared punches the private pages out of the guest_memfd. Punching comes last because
  it is the only step that cannot be undone: nothing that can fail follows it. Private pages come into being when they are touched, and
  since to-shared punched what was there, they start as zeroes.

Invariants
- one conversion at a time (a lock), so a vCPU that faults on a page in transit waits and then finds it done;
- the record is bounded: the last `HISTORY` conversions and the number of all; a guest that converts for ever costs a constant.
"""

from __future__ import annotations

import errno as errnos
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from vmm.checks import GpaRange
from vmm.gpamap import PRIVATE, SHARED, GpaMap

EXPLICIT = "explicit"
IMPLICIT = "implicit"
HISTORY = 65536
"""Conversions kept for the report, about 12 MiB at most."""


class Conversion(NamedTuple):
    """One finished conversion: `[gpa, gpa + size)` became `to` ("private" or "shared"), by `cause` ("explicit" or "implicit") of `vcpu`."""

    gpa: int
    size: int
    to: str
    cause: str
    vcpu: int

    def to_json(self) -> dict[str, Any]:
        """The JSON object in `conversions`."""
        return self._asdict()


class ConversionFailed(Exception):
    """A step failed and everything is as before: `code` is the negative errno for the guest, `step` what failed."""

    def __init__(self, code: int, step: str, cause: OSError) -> None:
        super().__init__(f"{step}: {cause}")
        self.code = code
        self.step = step


class Step(NamedTuple):
    """One step of a conversion: what it is called, how it is done, how it is undone. `do` raises OSError and then has changed nothing."""

    name: str
    do: Callable[[], object]
    undo: Callable[[], object]


class Backing(Protocol):
    """What stands behind the guest's pages on one VM type."""

    def steps(self, range: GpaRange, private: bool, before: GpaMap) -> Sequence[Step]:
        """The steps that convert `range`, in order; `before` is the map as it is, for undoing."""
        ...


class MapOnly:
    """Backing of plain and SEV VMs: memory stays where it is, the map is all that changes."""

    def steps(self, range: GpaRange, private: bool, before: GpaMap) -> Sequence[Step]:
        """No steps."""
        return ()


class Converter:
    """Converts ranges of one VM, one at a time, and remembers what it did."""

    def __init__(self, map: GpaMap, backing: Backing | None = None, history: int = HISTORY) -> None:
        self.map = map
        self.backing: Backing = backing or MapOnly()
        self.records: deque[Conversion] = deque(maxlen=history)
        self.total = 0
        self.pending: GpaRange | None = None
        self.lock = threading.RLock()

    def convert(self, range: GpaRange, private: bool, cause: str, vcpu: int) -> Conversion:
        """Make `range` private or shared; raises `ConversionFailed` when nothing changed.

        A range that has the state already goes through the same steps (KVM allows that) and is recorded like any other.
        """
        gpa, size = range
        with self.lock:
            self.pending = range
            try:
                steps = self.backing.steps(range, private, self.map)
                if steps:
                    self._do(steps)
                self.map.set_range(gpa, size, private)
            finally:
                self.pending = None
            done = Conversion(gpa, size, PRIVATE if private else SHARED, cause, vcpu)
            self.total += 1
            self.records.append(done)
            return done

    def snapshot(self) -> tuple[list[Conversion], int]:
        """The conversions still on record, oldest first, and how many there were in all."""
        with self.lock:
            return list(self.records), self.total

    def _do(self, steps: Sequence[Step]) -> None:
        """All of the steps, or none."""
        done = 0
        try:
            for step in steps:
                step.do()
                done += 1
        except OSError as failure:
            _undo(steps[:done])
            raise ConversionFailed(-(failure.errno or errnos.EIO), steps[done].name, failure) from failure
        except BaseException:  # a bug or Ctrl-C: the guest must still not be left half converted
            _undo(steps[:done])
            raise


def _undo(done: Sequence[Step]) -> None:
    """Undo steps in reverse order; one that cannot be undone must not keep the others from it."""
    failures: list[Exception] = []
    for step in reversed(done):
        try:
            step.undo()
        except OSError as failure:
            failures.append(failure)
    if failures:
        raise ExceptionGroup("a failed conversion could not be undone", failures)
