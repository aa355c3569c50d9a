"""`sevmm selftest` on the model, the whole of it, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchlib.entry import TREE, Measured, entry, need

SLOWEST = 5.0  # seconds that any single case may take


@entry("selftest_s", "s", 60)
def selftest() -> Measured:
    """All selftests on the model, two at a time; also missed if a test fails or one alone takes more than 5 s."""
    need("model")
    need("gcc")
    command = [sys.executable, "-m", "vmm.cli", "selftest", "--on", "model", "-j", "2", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    report = json.loads(done.stdout)
    slowest = max(report["tests"], key=lambda test: float(test["elapsed_s"]))
    detail = {
        **report["totals"],
        "slowest": f"{slowest['suite']}.{slowest['test']} [{slowest['type']}, {slowest['dialect']}]",
        "slowest_s": round(slowest["elapsed_s"], 2),
    }
    value = float(report["elapsed_s"])
    good = done.returncode == 0 and slowest["elapsed_s"] <= SLOWEST
    return Measured(value, None if good else False, detail)
