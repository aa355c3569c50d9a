"""vCPUs in threads: what atomics cost when they contend, and how soon a spinning guest is out of KVM_RUN.

Atomics: four vCPUs add to one counter with `lock inc` and `lock xadd`. No addition may be lost, and the value is their
throughput together relative to one vCPU that does all the additions alone (1 = as fast).

Kicks: the guest spins and the VMM sets kvm_run.immediate_exit from another thread, without a signal. The value is the
99th percentile of the time from there until KVM_RUN has returned EINTR, of one vCPU alone and of one of four that all
spin, whichever is worse. When a vCPU of the four is kicked, it may be in the guest or wait for its turn. What the
machine itself adds is in `detail`, by how much a sleep of one millisecond was late in the same run: on a busy machine
the worst of both are the same thing.
"""

from __future__ import annotations

import random
import threading
import time
from errno import EINTR
from typing import TYPE_CHECKING

from benchlib import loops
from benchlib.bare import DATA, BareGuest, GuestFailed
from benchlib.entry import Measured, entry, interleaved, median, need, seconds

if TYPE_CHECKING:
    from kvmapi.vcpu import Vcpu

VCPUS = 4
ATOMIC_ROUNDS = 2_000_000  # in all; two additions a round
KICKS = 400
LOST = 30.0  # seconds after which a kick is lost


def _together(guest: BareGuest) -> float:
    """All vCPUs run to HLT; the time until the last one is there, the counter checked."""
    guest.put(DATA, bytes(8))
    for vcpu in guest.vcpus:
        guest.rewind(vcpu)
    failures: list[BaseException] = []

    def run(vcpu: Vcpu) -> None:
        try:
            guest.run_to_halt(vcpu)
        except BaseException as failure:  # told in the caller's thread
            failures.append(failure)

    def all_of_them() -> None:
        threads = [threading.Thread(target=run, args=(vcpu,)) for vcpu in guest.vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    elapsed = seconds(all_of_them)
    if failures:
        raise failures[0]
    if guest.word(DATA) != 2 * ATOMIC_ROUNDS:
        raise GuestFailed(f"{2 * ATOMIC_ROUNDS - guest.word(DATA)} of {2 * ATOMIC_ROUNDS} additions were lost")
    return elapsed


@entry("atomics_4_vcpus", "speed", 0.5, at_least=True)
def atomics() -> Measured:
    """Contended lock inc and lock xadd of 4 vCPUs in 4 threads, none lost: throughput relative to one vCPU."""
    need("model")
    with (
        BareGuest(loops.atomics(ATOMIC_ROUNDS, DATA) + loops.HLT) as alone,
        BareGuest(loops.atomics(ATOMIC_ROUNDS // VCPUS, DATA) + loops.HLT, vcpus=VCPUS) as four,
    ):
        _together(alone)
        _together(four)
        one, many = interleaved(7, lambda: _together(alone), lambda: _together(four))
    ratio = median([a / b for a, b in zip(one, many, strict=True)])
    rates = {name: round(2 * ATOMIC_ROUNDS / median(times) / 1e6, 1) for name, times in (("one", one), ("four", many))}
    return Measured(ratio, None, {"million_per_s": rates, "additions": 2 * ATOMIC_ROUNDS, "lost": 0})


class _Spinner:
    """A thread that runs a vCPU for ever and notes when each KVM_RUN returned."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.returned = 0.0
        self.out = threading.Event()
        self.ending = False
        self.failure: str | None = None
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.thread.start()

    def _spin(self) -> None:
        try:
            while not self.ending and self.failure is None:
                result = self.vcpu.run()
                self.returned = time.perf_counter()
                self.vcpu.request_exit(False)
                if result != EINTR:
                    self.failure = f"KVM_RUN gave {result}, {self.vcpu.exit(result)}, instead of EINTR"
                self.out.set()
        except BaseException as failure:  # told in the kicker's thread
            self.failure = f"{type(failure).__name__}: {failure}"
            self.out.set()

    def kick(self) -> float:
        """Seconds from immediate_exit to the return of KVM_RUN."""
        self.out.clear()
        if self.failure is not None:  # it has ended, and will not set `out` again
            raise GuestFailed(self.failure)
        began = time.perf_counter()
        self.vcpu.request_exit()
        came = self.out.wait(LOST)
        if self.failure is not None or not came:
            raise GuestFailed(self.failure or f"a spinning vCPU did not leave KVM_RUN within {LOST:g} s")
        return self.returned - began

    def end(self) -> None:
        self.ending = True
        self.vcpu.request_exit()
        self.thread.join(LOST)


def _summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and worst of milliseconds."""
    times = sorted(times)
    return {"p50_ms": round(median(times), 3), "p99_ms": round(times[len(times) * 99 // 100], 3), "max_ms": round(times[-1], 3)}


def _late() -> float:
    """By how many milliseconds a sleep of one is late."""
    return (seconds(lambda: time.sleep(0.001)) - 0.001) * 1e3


def _latencies(vcpus: int) -> tuple[dict[str, float], dict[str, float]]:
    """How late KVM_RUN returned, and how late this thread's sleeps ended meanwhile."""
    chance = random.Random(vcpus)
    with BareGuest(loops.spin(DATA), vcpus=vcpus) as guest:
        spinners = [_Spinner(vcpu) for vcpu in guest.vcpus]
        try:
            times, sleeps = [], []
            for _ in range(KICKS):
                before = guest.word(DATA)
                sleeps.append(_late())
                time.sleep(chance.uniform(0, 0.003))  # the guest is at a random place
                while guest.word(DATA) == before:
                    time.sleep(0.0005)
                times.append(chance.choice(spinners).kick() * 1e3)
        finally:
            for spinner in spinners:
                spinner.end()
    return _summary(times), _summary(sleeps)


@entry("kick_p99_ms", "ms", 5)
def kick() -> Measured:
    """99th percentile from immediate_exit (another thread) to EINTR for a spinning guest on the model; 1 and 4 vCPUs."""
    need("model")
    (one, late), (four, late_four) = _latencies(1), _latencies(VCPUS)
    detail = {"one_vcpu": one, "one_vcpu_sleep_late": late, "four_vcpus": four, "four_vcpus_sleep_late": late_four, "kicks": KICKS}
    return Measured(max(one["p99_ms"], four["p99_ms"]), None, detail)
