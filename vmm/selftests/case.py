"""On what a test runs: a VM type, a dialect and the host that answers (a *case*), and what a test says about it (`runs_on`).

A test function without `runs_on` runs once, on type plain in the mainline dialect. With it, once for every type and dialect named.
For each of these the host is found as for any guest (`vmm.rungs`): the kernel where it offers the type and everything the test needs, the
model otherwise, unless `--on` decides. Where no host can, the test is skipped with the sentence that says why and what to do.

The model of a case is fresh and keeps nothing: a test can neither see what another one did nor touch the user's platform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from vmm.rungs import TYPES, Unsupported, choose

if TYPE_CHECKING:
    from kvmapi.host import Host

MAINLINE = "mainline"
ATTRIBUTE = "__selftest__"
F = TypeVar("F", bound=Callable[..., object])


class Skip(Exception):
    """A test (or subtest) cannot run here; the text says what is missing and how to get it."""


@dataclass(frozen=True)
class RunsOn:
    """What a test says. `rungs`: kernel, model or both; `needs`: of `vmm.rungs.NEEDS`; `timeout` in seconds, None = the run's."""

    types: tuple[str, ...] = ("plain",)
    dialects: tuple[str, ...] = (MAINLINE,)
    rungs: tuple[str, ...] = ("kernel", "model")
    needs: frozenset[str] = frozenset()
    timeout: float | None = None


@dataclass(frozen=True)
class Case:
    """One combination: VM type, dialect, and the rung ("kernel" or "model") with the reason why it was chosen."""

    type: str
    dialect: str
    rung: str
    reason: str = ""
    needs: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """For people and file names: `sev-es`, or `sev-upm-v7` outside mainline."""
        return case_id(self.type, self.dialect)

    @property
    def vm_type(self) -> int:
        """KVM_X86_*_VM."""
        return TYPES[self.type]

    def new_host(self) -> Host:
        """The kernel, or a fresh model in this dialect."""
        if self.rung == "kernel":
            from kvmapi.kernel import KernelHost

            return KernelHost()
        return new_model(self.dialect)


def case_id(type: str, dialect: str) -> str:
    """See `Case.id`."""
    return type if dialect == MAINLINE else f"{type}-{dialect}"


def runs_on(
    *types: str,
    dialects: tuple[str, ...] = (MAINLINE,),
    rungs: tuple[str, ...] = ("kernel", "model"),
    needs: frozenset[str] | set[str] = frozenset(),
    timeout: float | None = None,
) -> Callable[[F], F]:
    """Decorator: on which VM types and dialects a test runs, once on each; `needs={"hypercall"}` where MAP_GPA_RANGE must reach user space.

    Raises ValueError for a type that does not exist.
    """
    unknown = set(types) - set(TYPES)
    if unknown:
        raise ValueError(f"no VM type {', '.join(sorted(unknown))}; there are {', '.join(TYPES)}")

    def mark(function: F) -> F:
        setattr(function, ATTRIBUTE, RunsOn(types or ("plain",), dialects, rungs, frozenset(needs), timeout))
        return function

    return mark


def declared(function: Callable[..., object]) -> RunsOn:
    """What `runs_on` said about a function; the default where it said nothing."""
    found: RunsOn = getattr(function, ATTRIBUTE, RunsOn())
    return found


def combinations(what: RunsOn) -> Iterator[tuple[str, str]]:
    """The (type, dialect) pairs of a test, in the order it names them."""
    for type in what.types:
        for dialect in what.dialects:
            yield type, dialect


def find_case(type: str, dialect: str, what: RunsOn, on: str = "auto") -> Case:
    """The case for one combination; raises `Skip` where no host can run it."""
    if on != "auto" and on not in what.rungs:
        raise Skip(f"this test is for the {' and the '.join(what.rungs)} only")
    if dialect != MAINLINE and on == "kernel":
        raise Skip(f"the kernel speaks the mainline dialect, not {dialect}; use --on model")
    wanted = on
    if on == "auto" and (dialect != MAINLINE or what.rungs == ("model",)):
        wanted = "model"
    if on == "auto" and what.rungs == ("kernel",):
        wanted = "kernel"
    if wanted == "model":
        reason = "asked for" if on == "model" else f"the kernel speaks no {dialect}" if dialect != MAINLINE else "a test of the model"
        return Case(type, dialect, "model", reason, what.needs)
    try:
        reason = _kernel(type, what.needs)
    except Unsupported as refusal:
        if wanted == "kernel":
            raise Skip(_doctor(type, what.needs) or str(refusal)) from refusal
        return Case(type, dialect, "model", refusal.reason, what.needs)
    return Case(type, dialect, "kernel", reason, what.needs)


@cache
def _kernel(type: str, needs: frozenset[str]) -> str:
    """Why the kernel can; raises `Unsupported` with why not. Its answers do not change while a process lives."""
    return choose(type, "kernel", needs).reason


@cache
def _doctor(type: str, needs: frozenset[str]) -> str | None:
    """What the doctor says is missing on the kernel's side, and the remedy."""
    from vmm.doctor import reason_missing

    reasons = map(reason_missing, ["kvm" if type == "plain" else type, *sorted(needs)])
    return next((reason for reason in reasons if reason is not None), None)


def new_model(dialect: str) -> Host:
    """A fresh model that keeps nothing; raises `Skip` where it cannot be had, or does not know the dialect."""
    try:
        from kvmapi.model.host import ModelHost
        from kvmapi.model.platform import Platform
    except ImportError as failure:
        raise Skip(f"the model cannot be loaded: {failure}; pip install unicorn==2.1.4 cryptography") from failure
    if dialect == MAINLINE:
        return ModelHost()
    make: Any = Platform
    try:
        return ModelHost(make(dialect=dialect))
    except (TypeError, ValueError) as refusal:
        raise Skip(f"the model does not speak the dialect {dialect}: {refusal}") from refusal
