"""`sevmm exec`, measured from inside the program that runs under it (scripts/bench_exec.c).

The supervisor and the program share one CPU where a target says so: an answer is then a switch of context; on two CPUs it is a
wake-up across them, which depends on how deep the other one sleeps. `detail` has the numbers without that bond, and the
real /dev/kvm's where there is one. Ratios compare runs of the same minute, taken in turn.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchlib.entry import TREE, Measured, Skipped, entry, interleaved, median, need

CALLS, EXITS, NATIVE_CALLS, OPENS = 5_000, 3_000, 200_000, 3_000
ROUNDS = 5
TURNS = 3
"""How often the two sides of a ratio take turns."""
TOUCHED = (0, 1, 16, 64)
"""MiB."""


class Program:
    """bench_exec, natively or supervised."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._one_cpu = ["taskset", "--cpu-list", str(max(os.sched_getaffinity(0)))]

    def rounds(self, what: str, count: int, *, native: bool = False, bound: bool = True, rounds: int = ROUNDS) -> list[float]:
        """Microseconds, a number per round."""
        verb = [*(self._one_cpu if bound else []), *([] if native else [sys.executable, "-m", "vmm.cli", "exec", "--"])]
        done = subprocess.run(
            [*verb, str(self._path), what, str(count), str(rounds)],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(TREE)},
        )  # fmt: skip
        if done.returncode == 4:
            raise Skipped(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"{what}: exit status {done.returncode}: {done.stderr.strip()[-300:]}")
        return [float(line) for line in done.stdout.split()]

    def us(self, what: str, count: int, *, native: bool = False, bound: bool = True) -> float:
        """The middle round."""
        return median(self.rounds(what, count, native=native, bound=bound))

    def beside(self, what: str, count: int) -> dict[str, float]:
        """For `detail`: without one CPU for both, and on the real device."""
        from vmm.doctor import reason_missing

        found = {f"{what}_unbound_us": round(self.us(what, count, bound=False), 2)}
        if reason_missing("kvm") is None:
            found[f"{what}_kernel_us"] = round(self.us(what, count, native=True), 2)
        return found


@contextmanager
def program() -> Iterator[Program]:
    """Built anew. `Skipped` where it cannot be."""
    need("model")
    need("gcc")
    if shutil.which("taskset") is None:
        raise Skipped("needs taskset; get it: apt install util-linux")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench_exec"
        source = TREE / "scripts" / "bench_exec.c"
        built = subprocess.run(["gcc", "-O2", "-o", str(path), str(source)], capture_output=True, text=True, check=False)
        if built.returncode != 0:
            raise Skipped(f"needs <linux/kvm.h>: {built.stderr.strip().splitlines()[0]}; get it: apt install linux-libc-dev libc6-dev")
        yield Program(path)


@entry("exec_ioctl_us", "us", 15)
def exec_ioctl() -> Measured:
    """sevmm exec: a trapped ioctl (the dearer of GET_API_VERSION and CHECK_EXTENSION), on one CPU."""
    with program() as one:
        found = {what: one.us(what, CALLS) for what in ("version", "extension")}
        detail = {f"{what}_us": round(value, 2) for what, value in found.items()}
        return Measured(max(found.values()), None, {**detail, **one.beside("extension", CALLS), "rounds": ROUNDS})


@entry("exec_exit_us", "us", 35)
def exec_exit() -> Measured:
    """sevmm exec: an exit for OUT, from KVM_RUN to KVM_RUN, on one CPU."""
    with program() as one:
        return Measured(one.us("out", EXITS), None, {**one.beside("out", EXITS), "rounds": ROUNDS})


@entry("exec_untrapped", "ratio", 1.3)
def exec_untrapped() -> Measured:
    """sevmm exec: system calls that are not ours over native ones (the worse of getpid, and a byte through a pipe)."""
    with program() as one:
        ratios: dict[str, float] = {}
        detail: dict[str, float] = {}
        for what in ("getpid", "pipe"):
            ours, native = interleaved(
                TURNS, lambda what=what: one.us(what, NATIVE_CALLS), lambda what=what: one.us(what, NATIVE_CALLS, native=True)
            )
            ratios[what] = median([our / their for our, their in zip(ours, native, strict=True)])
            detail |= {f"{what}_us": round(median(ours), 4), f"{what}_native_us": round(median(native), 4), what: round(ratios[what], 3)}
        return Measured(max(ratios.values()), None, {**detail, "turns": TURNS})


@entry("exec_open_us", "us", 25)
def exec_open() -> Measured:
    """sevmm exec: open and close of a file that is not ours, on one CPU."""
    with program() as one:
        value = one.us("open", OPENS)
        return Measured(value, None, {**one.beside("open", OPENS), "kvm_us": round(one.us("kvm", OPENS // 3), 2), "rounds": ROUNDS})


def _fresh_ms(mib: int) -> float:
    """Milliseconds in which the kernel gives this process `mib` MiB of fresh memory."""
    with mmap.mmap(-1, mib << 20) as memory:
        cell = ctypes.c_char.from_buffer(memory)
        began = time.perf_counter()
        ctypes.memset(ctypes.addressof(cell), 1, mib << 20)
        took = time.perf_counter() - began
        del cell
        return took * 1000


@entry("exec_remap", "ratio", 1)
def exec_remap() -> Measured:
    """sevmm exec: time in which private memory becomes a slot, over 3 ms + 2 ms per touched MiB (0 to 64 MiB, the worst)."""
    with program() as one:
        ms = {touched: median(one.rounds("remap", touched, bound=False)) / 1000 for touched in TOUCHED}
        detail = {f"mib_{touched}_ms": round(value, 3) for touched, value in ms.items()}
        detail["fresh_64_mib_ms"] = round(median([_fresh_ms(64) for _ in range(ROUNDS)]), 3)  # the kernel's part, without us
        return Measured(max(value / (3 + 2 * touched) for touched, value in ms.items()), None, {**detail, "rounds": ROUNDS})
