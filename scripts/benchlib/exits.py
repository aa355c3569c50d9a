"""Exits per second of our run loop against a minimal C VMM, on the same real /dev/kvm, in turn.

Both run the same guest: real mode, `1: out dx, al; jmp 1b` on the serial port, and both read the byte that
was written, no more. The C program (scripts/bench_exits.c) prints microseconds per exit; ours is the run loop that every guest runs in. The
value is the median of the rounds' ratios: within a round, other load on the machine hits both sides alike. `detail` has the same with the
console that every guest has, whose work (keeping the text, with a limit) the C program does not do.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchlib.entry import TREE, Measured, Skipped, entry, interleaved, median, need

ROUNDS = 21
EXITS = 25_000
SECONDS = 0.2
GUEST = b"\xba\xf8\x03\xee\xeb\xfd"  # mov dx, 0x3f8; 1: out dx, al; jmp 1b
ENTRY = 0x1000


def minimal(port: int, size: int, count: int, data: memoryview, out: bool) -> None:
    """A device that reads the byte."""
    data[0]


def our_us(console: bool = False) -> float:
    """Run the guest for a while in `vmm.runloop`; microseconds per exit."""
    from kvmapi.kernel import KernelHost
    from kvmapi.system import System
    from vmm.boot import HOLE, MSR
    from vmm.devices import CONSOLE_PORT, Devices
    from vmm.dispatch import Dispatcher
    from vmm.runloop import RunLoop

    with ExitStack() as stack:
        vm = stack.enter_context(stack.enter_context(System(KernelHost())).create_vm())
        memory = mmap.mmap(-1, 1 << 20)
        memory[ENTRY : ENTRY + len(GUEST)] = GUEST
        vm.set_user_memory_region(0, 0, len(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        vcpu = stack.enter_context(vm.create_vcpu())
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        sregs.cs.base = sregs.cs.selector = 0
        regs.rip, regs.rflags = ENTRY, 2
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        devices = Devices(HOLE, MSR)
        if not console:
            devices.ports.handlers[CONSOLE_PORT] = minimal
        dispatcher = Dispatcher(None, None, devices)  # type: ignore[arg-type]  # port I/O only: no memory is converted
        outcome = RunLoop([vcpu], devices.ports, dispatcher).run(SECONDS)
    return outcome.elapsed_s / outcome.exits["IO"] * 1e6


@entry("exit_loop_vs_c", "ratio", 1.25)
def exit_loop_vs_c() -> Measured:
    """Time per exit of our run loop over that of a minimal C VMM, on the real /dev/kvm."""
    need("kvm")
    need("gcc")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bench_exits"
        built = subprocess.run(
            ["gcc", "-O2", "-o", str(program), str(TREE / "scripts" / "bench_exits.c")], capture_output=True, text=True, check=False
        )
        if built.returncode != 0:
            raise Skipped(f"needs <linux/kvm.h>: {built.stderr.strip().splitlines()[0]}; get it: apt install linux-libc-dev libc6-dev")

        def in_c() -> float:
            done = subprocess.run([str(program), str(EXITS), "1"], capture_output=True, text=True, check=True)
            return float(done.stdout)

        in_c()
        our_us()
        c, ours, console = interleaved(ROUNDS, in_c, our_us, lambda: our_us(console=True))

    def ratio(side: list[float]) -> float:
        return median([our / their for our, their in zip(side, c, strict=True)])

    us = {"c_us": c, "ours_us": ours, "console_us": console}
    detail = {name: round(median(values), 3) for name, values in us.items()}
    return Measured(ratio(ours), None, {**detail, "console_ratio": round(ratio(console), 4), "rounds": ROUNDS})
