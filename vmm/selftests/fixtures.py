"""Fixtures: what a test gets for naming a parameter. The same objects under `sevmm selftest` and under pytest.

    case      the combination this run is for (`vmm.selftests.case.Case`): .type .dialect .rung
    host      the Host behind the seam: the kernel, or a fresh model
    system    System(host), in the case's dialect (kvmapi.system, or kvmapi.dialects)
    vm        a bare Vm of the case's type: no memory, no vCPUs, on SEV not initialised
    guest     guest("name") or guest(C text) -> Image
    machine   machine(guest, ...) -> Bench: a machine with that guest, launched and ready to run
    subtest   with subtest("name"): ... a part with a result of its own
    note      note("2048 conversions, 41 us each"): a number for the reader, beside the result
    keep      keep(object) -> object: closed at the end of the test

A fixture is made when a test names it, once per run of the test; what it opened is closed afterwards, in reverse order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vmm.rungs import Unsupported
from vmm.selftests.case import MAINLINE, Case, Skip
from vmm.selftests.subtests import Subtest

if TYPE_CHECKING:
    from kvmapi.host import Host
    from kvmapi.system import System
    from kvmapi.vm import Vm
    from vmm.image import Image
    from vmm.selftests.bench import Bench, Slot

NAMES = ("case", "host", "system", "vm", "guest", "machine", "subtest", "note", "keep")


class Closeable(Protocol):
    """Anything with `close`."""

    def close(self) -> None:
        """Release it; twice does no harm."""
        ...


C = TypeVar("C", bound=Closeable)
Note = Callable[[str], None]
GuestLoader = Callable[[str], "Image"]


class Keep(Protocol):
    """The fixture `keep`."""

    def __call__(self, thing: C) -> C:
        """Close `thing` at the end of the test; returns it."""
        ...


class Fixtures:
    """The fixtures of one run of one test. A context manager; leaving it closes everything."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.subtest = Subtest()
        self.notes: list[str] = []
        self._stack = ExitStack()
        self._made: dict[str, Any] = {}

    def __enter__(self) -> Fixtures:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what the test opened, last first."""
        self._made.clear()
        self._stack.close()

    def get(self, name: str) -> Any:
        """The fixture called `name`; KeyError with the names there are."""
        if name not in NAMES:
            raise KeyError(f"no fixture {name!r}; there are {', '.join(NAMES)}")
        return getattr(self, name)

    @property
    def host(self) -> Host:
        """See the module's list; so for the others."""
        host: Host = self._once("host", self.case.new_host)
        return host

    @property
    def system(self) -> System:
        system: System = self._once("system", self._open_system)
        return system

    def _open_system(self) -> System:
        if self.case.dialect == MAINLINE:
            from kvmapi.system import System

            return self.keep(System(self.host))
        from kvmapi import dialects

        return self.keep(dialects.System(self.host, self.case.dialect))

    @property
    def vm(self) -> Vm:
        vm: Vm = self._once("vm", lambda: self.keep(self.system.create_vm(self.case.vm_type)))
        return vm

    @property
    def guest(self) -> Callable[[str], Image]:
        return load_guest

    @property
    def machine(self) -> MachineFactory:
        return MachineFactory(self)

    def note(self, text: str) -> None:
        """Put one line into the report, whether the test passes or not."""
        self.notes.append(" ".join(text.split()))

    def keep(self, thing: C) -> C:
        """Close `thing` at the end of the test; returns it."""
        self._stack.callback(thing.close)
        return thing

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class MachineFactory:
    """The fixture `machine`."""

    def __init__(self, fixtures: Fixtures) -> None:
        self._fixtures = fixtures

    def __call__(
        self,
        guest: str | Image,
        *,
        type: str | None = None,
        memory: int = 16 << 20,
        vcpus: int = 1,
        policy: int | None = None,
        arguments: str = "",
        slots: Sequence[Slot] = (),
        prepare: Callable[[Bench], None] | None = None,
        patience: float | None = None,
        **config: Any,
    ) -> Bench:
        """A machine of the case's type with `guest` (bundled name, C text or image), launched; closed at the end of the test.

        `memory` in bytes. `slots` and `prepare`: see `vmm.selftests.bench`. `config`: more of `vmm.config.MachineConfig` (secret,
        lazy_private, hypercalls, record). Raises `Skip` without a compiler, and where this host cannot have such a machine.
        """
        from vmm.config import MachineConfig
        from vmm.selftests.bench import PATIENCE, Bench

        fixtures = self._fixtures
        image = load_guest(guest) if isinstance(guest, str) else guest
        config.setdefault("dialect", fixtures.case.dialect)
        config.setdefault("hypercalls", fixtures.case.rung == "model" or _hypercalls(fixtures))
        wanted = MachineConfig(
            image, fixtures.host, type or fixtures.case.type, memory, vcpus, policy, arguments.encode(), **config
        )  # fmt: skip
        try:
            return fixtures.keep(Bench(wanted, slots, prepare, PATIENCE if patience is None else patience))
        except Unsupported as refusal:
            raise Skip(str(refusal)) from refusal


def _hypercalls(fixtures: Fixtures) -> bool:
    from vmm import probe

    return "hypercall" in fixtures.case.needs or probe.hypercall_exits(fixtures.host)


def load_guest(guest: str) -> Image:
    """A bundled guest by its name, or C text (it has more than one line) compiled with guest/lib. Raises `Skip` without a compiler."""
    from guest.build import ToolMissing, build, build_text
    from vmm.image import load

    try:
        return load(build_text(guest) if "\n" in guest else build(guest))
    except ToolMissing as missing:
        raise Skip(str(missing)) from missing
