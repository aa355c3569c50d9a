"""Programs that make it hard for whoever answers them: nothing of theirs is lost, and nobody waits for ever."""

from __future__ import annotations

import pytest

from tests.exec.conftest import Build
from tests.exec.launching import Under

pytestmark = [pytest.mark.gcc, pytest.mark.model]

CASES = {
    "failed-exec": (),
    "exec": (),
    "exec32": (),
    "few-fds": (),
    "storm": ("--platform", "sev,asids=1"),
    "faults": (),
    "lease": (),
    "stack": (),
    "vforks": (),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_programs(build: Build, case: str) -> None:
    done = Under("exec", options=CASES[case]).run(build("hostile"), case)
    if done.returncode == 77:
        pytest.skip(f"needs {done.stdout.strip()}; get it: CONFIG_IA32_EMULATION, or vm.unprivileged_userfaultfd=1")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def test_a_filter_of_the_program(build: Build) -> None:
    """It traps what we let the program do. Its signal and its fds are its own; memory is mirrored."""
    done = Under("exec").run(build("hostile"), "own-filter")
    assert done.returncode == 0, done.stdout
    assert done.stderr.startswith("sevmm exec: guest RAM cannot be shared") and done.stderr.count("\n") == 1, done.stderr
