"""`sevmm run hello` as a user waits for it: from the start of the launcher to its exit."""

from __future__ import annotations

import subprocess

from benchlib.entry import TREE, Measured, Skipped, entry, interleaved, median, need, seconds

ROUNDS = 10


@entry("hello_s", "s", 0.35)
def hello() -> Measured:
    """`sevmm run hello --type plain`, whole process, median of 10; the slower of the model and the kernel (where there is one)."""
    sides = []
    missing = {}
    for side, kind in (("model", "model"), ("kernel", "kvm")):
        try:
            need(kind)
            sides.append(side)
        except Skipped as reason:
            missing[side] = str(reason)
    if not sides:
        raise Skipped("; ".join(missing.values()))

    def once(side: str) -> None:
        command = [str(TREE / "scripts" / "sevmm"), "run", "hello", "--type", "plain", "--on", side]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    for side in sides:
        once(side)  # makes the environment, builds the guest, compiles modules
    measured = interleaved(ROUNDS, *(lambda side=side: seconds(lambda: once(side)) for side in sides))
    medians = {side: round(median(times), 4) for side, times in zip(sides, measured, strict=True)}
    return Measured(max(medians.values()), None, {"rounds": ROUNDS, "medians": medians, "missing": missing})
