"""`Bench`: a machine under test. A `vmm.machine.Machine` that a test drives exit by exit, with memory slots and mappings of its own.

Built as any guest's machine (same boot pages, launch, devices), and then
- `slots` are added and mapped before the guest starts, and `prepare` may do more of that;
- instead of a run loop, the test asks for the next thing it wants to see: `sync(stage)`, `done()`, `until(MemoryFault)`. What comes
  before that is answered as `sevmm run` would: console, ports, MMIO, conversions (by hypercall and by fault); `handlers` see it first;
- `background` does the same in a thread, while the test changes slots or attributes under the running guest.

Invariants
- a vCPU is run by one thread at a time;
- every wait ends: after `patience` seconds the vCPU is kicked out of KVM_RUN and the test fails, whatever the guest does;
- what the test did not ask for and nobody answers is a failure that says everything the exit says, and what the guest printed.
"""

from __future__ import annotations

import errno as errnos
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvmapi.exit_types import Exit, Hlt, Io
from vmm import kick
from vmm.config import MachineConfig
from vmm.devices import GuestStop
from vmm.dispatch import Stop
from vmm.machine import Machine
from vmm.selftests import ucall
from vmm.selftests.checks import Failure
from vmm.selftests.tables import PAGE_4K, PageTables
from vmm.selftests.ucall import Abort, Done, Sync, Ucall
from vmm.selftests.watch import Watch

if TYPE_CHECKING:
    from kvmapi.vcpu import Vcpu
    from vmm.memory import MemorySlot

PATIENCE = 10.0
"""Seconds a test waits for its guest, unless it says otherwise."""

T = TypeVar("T", bound=Exit)
R = TypeVar("R")


@dataclass(frozen=True)
class Slot:
    """A memslot of a test: `size` bytes at `gpa`, with a guest_memfd or without, mapped at `gva` (None: at the same address; False: not).

    `private`: mapped with the C-bit (SEV). `page`: bytes of one page of the mapping, 4 KiB or 2 MiB.
    """

    id: int
    gpa: int
    size: int
    guest_memfd: bool = False
    gva: int | Literal[False] | None = None
    private: bool = False
    page: int = PAGE_4K


class Bench(Machine):
    """A machine whose vCPUs the test runs. Made by the fixture `machine`."""

    def __init__(
        self,
        config: MachineConfig,
        slots: Sequence[Slot] = (),
        prepare: Callable[[Bench], None] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """Build and launch; `prepare` is called when everything but the launch is done. Raises as `Machine`."""
        self.tables = PageTables({}, 0)
        self.patience = patience
        self.counts: Counter[str] = Counter()
        self._own_slots = tuple(slots)
        self._prepare = prepare
        self._stopping = False
        self._watch = Watch(self._kick)
        super().__init__(config)
        for slot in slots:  # the launch made everything private in the map
            self.map.set_range(slot.gpa, slot.size, private=slot.private and self.c_mask != 0)

    # -- before the guest starts ---------------------------------------------------------------------------------------------------------

    def add_slot(self, slot: Slot) -> MemorySlot:
        """Make a memslot (backed by a new memfd) and, before the guest starts, map it; on SEV it is pinned too. Raises KvmError."""
        made = self.memory.add_slot(slot.id, slot.gpa, slot.size, slot.guest_memfd)
        if self.config.type.startswith("sev"):
            self.vm.register_enc_region(made.hva, made.size)
        if slot.gva is not False:
            gva = slot.gpa if slot.gva is None else slot.gva
            self.tables.map(gva, slot.gpa, slot.size, slot.private, slot.page)
        return made

    def _load(self) -> dict[int, bytes | memoryview]:
        contents = super()._load()
        self.tables = PageTables(contents, self.c_mask)
        for slot in self._own_slots:
            self.add_slot(slot)
        if self._prepare is not None:
            self._prepare(self)
        for gpa in self.tables.changed:
            contents[gpa] = bytes(self.tables.pages[gpa])
            self.memory.write(gpa, contents[gpa])
        self.tables.changed.clear()
        return dict(sorted(contents.items()))

    # -- running -------------------------------------------------------------------------------------------------------------------------

    def step(self, vcpu: int = 0) -> Exit:
        """One KVM_RUN, its exit unanswered: for tests that look at every exit. Interrupted runs are repeated. Raises KvmError."""
        return self._watched(vcpu, lambda deadline: self._enter(self.vcpus[vcpu], deadline))

    def next(self, vcpu: int = 0) -> Ucall:
        """Run until the guest says something (`Sync`, `Done`), answering what `sevmm run` answers. A guest that failed is a failure."""
        found = self._watched(vcpu, lambda deadline: self._until(self.vcpus[vcpu], None, deadline))
        if isinstance(found, Exit):
            raise self._failure(f"expected a ucall, got {found}")
        return found

    def sync(self, stage: int | None = None, vcpu: int = 0) -> Sync:
        """Run until the guest's next ucall, which must be a SYNC (with this stage)."""
        found = self.next(vcpu)
        if not isinstance(found, Sync) or stage not in (None, found.stage):
            raise self._failure(f"expected SYNC {'' if stage is None else stage}, the guest sent {found}")
        return found

    def done(self, vcpu: int = 0) -> None:
        """Run until the guest's next ucall, which must be DONE."""
        found = self.next(vcpu)
        if not isinstance(found, Done):
            raise self._failure(f"expected DONE, the guest sent {found}")

    def until(self, kind: type[T], vcpu: int = 0) -> T:
        """Run until an exit of this kind (kvmapi.exit_types), and leave it unanswered. A ucall before that is a failure."""
        found = self._watched(vcpu, lambda deadline: self._until(self.vcpus[vcpu], kind, deadline))
        if not isinstance(found, kind):
            raise self._failure(f"expected an exit {kind.__name__}, the guest sent {found}")
        return found

    def answer(self, value: int, vcpu: int = 0) -> None:
        """What the guest's last ucall_sync() returns."""
        ucall.answer(self.memory, vcpu, value)

    def background(self, call: Callable[[], object] | None = None, vcpu: int = 0) -> Background:
        """Run `call` (default: `done(vcpu)`) in a thread; a context manager, see `Background`.

        >>> with machine.background(lambda: machine.until(MemoryFault)) as run:   # doctest: +SKIP
        ...     machine.vm.set_user_memory_region2(10, 0xC0000000, 0, 0)
        ...     fault = run.result()
        """
        return Background(self, call or (lambda: self.done(vcpu)), vcpu)

    def expire(self, vcpu: int = 0) -> None:
        """Whoever runs `vcpu` gives up now, with a failure."""
        self._stopping = True
        self._watch.expire(vcpu)

    # -- what happened -------------------------------------------------------------------------------------------------------------------

    @property
    def console(self) -> str:
        """What the guest printed so far."""
        return self.devices.console.text()

    def expect_console(self, *texts: str) -> None:
        """The console must hold these texts, in this order."""
        at, all_of_it = 0, self.console
        for text in texts:
            found = all_of_it.find(text, at)
            if found < 0:
                raise self._failure(f"the console lacks {text!r}")
            at = found + len(text)

    def expect_exits(self, **counts: int) -> None:
        """These exits (kernel's names: HYPERCALL, MEMORY_FAULT, MMIO, IO, ...) must have come this often, others do not matter."""
        wrong = {name: self.counts[name] for name, count in counts.items() if self.counts[name] != count}
        if wrong:
            raise self._failure(f"exits {wrong}, expected { {name: counts[name] for name in wrong} }")

    def expect_map(self, gpa: int, size: int, state: str) -> None:
        """All of `[gpa, gpa + size)` must be "private" or "shared" in the machine's map."""
        other = [run for run in self.map.ranges(gpa, size) if run.state != state]
        if other or self.map.covered_until(gpa) < gpa + size:
            runs = ", ".join(f"[{run.gpa:#x}, {run.gpa + run.size:#x}) {run.state}" for run in other) or "a part has no memslot"
            raise self._failure(f"[{gpa:#x}, {gpa + size:#x}) should be {state}: {runs}")

    def expect_memory(self, gpa: int, data: bytes, what: str = "") -> None:
        """The host's view of guest memory at `gpa` must be `data`."""
        from vmm.selftests.checks import check_equal

        check_equal(self.memory.read(gpa, len(data)), data, what or f"the host's view of [{gpa:#x}, {gpa + len(data):#x})")

    def _kick(self, vcpu: int, thread: int) -> None:
        self.vcpus[vcpu].request_exit()
        kick.kick(thread)

    # -- inside --------------------------------------------------------------------------------------------------------------------------

    def _failure(self, text: str) -> Failure:
        said = self.console.strip()
        return Failure(f"{text}; the guest printed: {said[-2000:]}" if said else text)

    def _watched(self, vcpu: int, call: Callable[[float], R]) -> R:
        """`call`, which runs `vcpu` in this thread, under the watch."""
        kick.accept_kicks()
        self.vcpus[vcpu].request_exit(False)
        deadline = self._watch.enter(vcpu, self.patience)
        try:
            return call(deadline)
        finally:
            self._watch.leave(vcpu)
            self.vcpus[vcpu].request_exit(False)

    def _enter(self, vcpu: Vcpu, deadline: float) -> Exit:
        """One KVM_RUN; an interrupted one is repeated until `deadline`."""
        while (errno := vcpu.run()) == errnos.EINTR:
            if self._stopping or time.monotonic() >= deadline:
                raise self._failure(f"vCPU {vcpu.id} did not get there within {self.patience:g} s")
            vcpu.request_exit(False)
        exit = vcpu.exit(errno)
        self.counts[exit.name] += 1
        return exit

    def _until(self, vcpu: Vcpu, kind: type[Exit] | None, deadline: float) -> Exit | Ucall:
        """Run until a ucall or an exit of `kind`; everything else is answered."""
        while True:
            exit = self._enter(vcpu, deadline)
            if isinstance(exit, Hlt) or (isinstance(exit, Io) and exit.port == ucall.PORT):
                said = ucall.take(self.memory, vcpu.id)
                if isinstance(said, Abort):
                    raise self._failure(f"the guest gave up in line {said.line}, with {[hex(arg) for arg in said.args]}")
                if said is not None:
                    return said
            if kind is not None and isinstance(exit, kind):
                return exit
            try:
                if not self._answer(vcpu, exit):
                    raise self._failure(f"vCPU {vcpu.id} halted without a word")
            except GuestStop as stop:
                if stop.code:
                    raise self._failure(f"the guest ended with exit code {stop.code}") from None
                return Done(vcpu.id)
            except Stop as stop:
                raise self._failure(stop.sentence) from None

    def _answer(self, vcpu: Vcpu, exit: Exit) -> bool:
        """What `sevmm run` would do about an exit; False for a vCPU that has halted."""
        return any(handler(vcpu, exit) for handler in self.handlers) or self.dispatcher.dispatch(vcpu, exit)

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        self._watch.close()
        super().close()


class Background:
    """A call that runs a vCPU, in a thread of its own; a context manager that ends it.

    `result` waits for the call and returns what it returned, or raises what it raised. Leaving the `with` block waits too, unless the
    block is left by an exception: then the vCPU is kicked out, and what the thread raised is dropped.
    """

    def __init__(self, bench: Bench, call: Callable[[], R], vcpu: int) -> None:
        self._bench = bench
        self._call = call
        self._vcpu = vcpu
        self._value: object = None
        self._failure: BaseException | None = None
        self._asked = False
        self._thread = threading.Thread(target=self._main, name=f"selftest-vcpu{vcpu}", daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._bench.expire(self._vcpu)
        self._thread.join()
        if kind is None and not self._asked:
            self.result()

    @property
    def running(self) -> bool:
        """Whether the call has not come back yet."""
        return self._thread.is_alive()

    def result(self) -> Any:
        """What the call returned, once it has; raises what it raised."""
        self._asked = True
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._value

    def _main(self) -> None:
        try:
            self._value = self._call()
        except BaseException as failure:  # the test's thread raises it
            self._failure = failure
