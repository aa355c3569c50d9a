"""The command: choose entries, run them one after the other, print one JSON object."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import sys

from benchlib.entry import ENTRIES, progress

MODULES = (
    "exits", "model", "process", "gpamap", "cheap", "model_ioctls", "speed", "misses", "threads", "launch", "conversions", "suite",
    "interposed",
)  # fmt: skip


def main() -> int:
    """Exit status 0 when every measured entry meets its target, 1 when one does not, 2 usage."""
    for module in MODULES:
        importlib.import_module(f"benchlib.{module}")
    parser = argparse.ArgumentParser(prog="bench", description="Measure what sevmm promises; JSON on stdout.")
    parser.add_argument("--only", action="append", metavar="NAME", choices=list(ENTRIES), help="measure this entry (repeatable)")
    parser.add_argument("--list", action="store_true", help="list the entries")
    options = parser.parse_args()
    if options.list:
        for known in ENTRIES.values():
            print(f"{known.name:<18} {known.bound} {known.target:<4g} {known.unit:<6} {known.story}")
        return 0
    results = []
    for name in options.only or list(ENTRIES):
        progress(f"{name} ...")
        gc.collect()
        gc.freeze()  # what earlier entries left is not looked through again and again
        result = ENTRIES[name].run()
        results.append(result)
        if result["skipped"]:
            progress(f"{name}: skipped, {result['skipped']}")
        elif result["value"] is None:
            progress(f"{name}: FAILED, {result['detail']['error']}")
        else:
            verdict = "ok" if result["ok"] else "MISSED"
            progress(f"{name}: {result['value']:g} {result['unit']} (target {ENTRIES[name].bound} {result['target']:g}) {verdict}")
    machine = {"kernel": platform.release(), "python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}
    print(json.dumps({"machine": machine, "entries": results}, indent=2))
    return 1 if any(result["ok"] is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
