"""Any ioctl, any argument, any fd, in any order, from three threads: an errno each time, and the model lives on.

This is scripts/fuzz with few calls: it runs in a process of its own, so that a crash is a failure of the test, and says
with which seed and after which calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.model
PROGRAM = "import sys; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; from fuzzlib.main import main; sys.exit(main())"


@pytest.mark.parametrize(("threads", "calls"), [(3, 60_000), (1, 20_000)])
def test_fuzz(tree: Path, threads: int, calls: int) -> None:
    command = [sys.executable, "-P", "-c", PROGRAM, str(tree), str(tree / "scripts")]
    command += ["--threads", str(threads), "--calls", str(calls), "--seed", "1", "--seconds", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    summary = json.loads(done.stdout)
    assert summary["calls"] == calls or summary["seconds"] >= 40, "a slow machine may stop early"
    assert {"KVM_RUN", "KVM_CREATE_VCPU", "KVM_SET_USER_MEMORY_REGION"} <= set(summary["succeeded"]), "it came far enough to matter"
