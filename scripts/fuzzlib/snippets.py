"""`scripts/fuzz snippets`: hostile code in guests of the model, in processes that may die without taking the rest along.

A snippet that ends its process or never ends (an immediate_exit that nobody saw) is a finding, as is any exception; processes.py
says how that is known. What a snippet is, is in hostile.py.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

from fuzzlib.fuzzer import rss_mib
from fuzzlib.hostile import Machine
from fuzzlib.processes import Plan, Subject, Turns, options
from fuzzlib.processes import main as run
from kvmapi.model.host import ModelHost

_CHILD = "from fuzzlib.snippets import child; child()"
HANG = 30.0  # seconds in one snippet
SNIPPETS_PER_VM = 5000
MOST_FINDINGS = 20


def main(argv: list[str]) -> int:
    """Exit status 0 when nothing was found, 1 when something was, 2 usage."""
    about = "Random bytes and mutated instructions, in every mode, in guests of the model."
    where = ("outside KVM_RUN", "in KVM_RUN")
    subject = Subject("snippets", "snippet", "snippets", _CHILD, HANG, MOST_FINDINGS, where, about)
    asked = options(subject, 20_000).parse_args(argv)
    exits: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    memory = [0]

    def take(said: dict[str, Any]) -> None:
        exits.update(said["exits"])
        modes.update(said["modes"])
        memory.append(said["rss_mib"])

    def summary(done: int, seconds: float) -> dict[str, Any]:
        rate = {"snippets_per_second": round(done / seconds), "rss_mib": max(memory)}
        return {**rate, "exits": dict(exits.most_common()), "modes": dict(modes.most_common())}

    return run(subject, Plan(asked.count, asked.seed, asked.seconds, asked.processes, asked.first), take, summary)


def child() -> None:
    """One process."""
    turns = Turns(MOST_FINDINGS)
    exits: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    machine: Machine | None = None

    def note(vcpu: int, inside: bool) -> None:
        if vcpu == 0:
            turns.progress.note(inside)

    def close() -> None:
        if machine is not None:
            exits.update(machine.counts)
            machine.close()

    def said() -> dict[str, Any]:
        close()
        return {"exits": exits, "modes": modes, "rss_mib": rss_mib()}

    for index in turns:
        if machine is None:
            machine = Machine(ModelHost(), turns.seed, note)
        try:
            modes[machine.one(index)] += 1
        except Exception:
            turns.findings.append((index, f"snippet {index}: {traceback.format_exc()}"))
        if (turns.done + 1) % SNIPPETS_PER_VM == 0 or turns.findings:
            close()
            machine = None
    turns.end(said)
