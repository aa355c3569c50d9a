"""Guest RAM of programs under `sevmm exec`: contents survive its becoming shared, whatever else goes on, and what the
program does to its memory afterwards reaches the guest.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.exec.conftest import Build
from tests.exec.launching import Under, soon
from tests.exec.test_programs import judge

pytestmark = [pytest.mark.gcc, pytest.mark.model]


@pytest.mark.parametrize("storm", ["quiet", "signals", "threads", "stop", "again", "ahead"])
def test_slots_in_a_storm(build: Build, under: Under, storm: str) -> None:
    judge(under.run(build("ram_storm"), storm, "60"))


def test_very_many_slots(build: Build, under: Under) -> None:
    """In seconds: what one of them costs must not grow with their number."""
    judge(under.run(build("slots")))


@pytest.mark.parametrize("change", ["protect", "unmap", "gap", "child", "moved"])
def test_changes_under_a_guest(build: Build, under: Under, change: str) -> None:
    judge(under.run(build("ram_changes"), change))


def test_a_file_cut_off_under_a_guest(build: Build, under: Under) -> None:
    """Its pages past the end are SIGBUS for whoever touches them: here that is the supervisor's engine."""
    judge(under.run(build("ram_changes"), "cut"))


@pytest.mark.parametrize("backing", ["private", "shared", "memfd", "memfd-closed", "file-private"])
def test_without_privileges(build: Build, anyone: tuple[str, ...], backing: str) -> None:
    """Shared anonymous memory and files that the program has closed are mirrored then: there is no way to them."""
    program = build("ram")
    folder = program.parent / "nobody"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    judge(Under("exec", before=anyone).run(program, backing, cwd=folder))


@pytest.mark.parametrize("after", [0.02, 0.1, 0.3])
def test_a_program_killed_in_a_storm(build: Build, under: Under, after: float) -> None:
    """Its threads are being held, or are not: it ends, and so does the supervisor."""
    process = under.start([build("ram_storm"), "threads", "30000"])

    def victims() -> list[int]:
        return [pid for pid, name in under.survivors().items() if name == "ram_storm"]

    assert soon(lambda: bool(victims()))
    time.sleep(after)
    os.kill(victims()[0], signal.SIGKILL)
    out, err = process.communicate(timeout=15)
    assert process.returncode == -signal.SIGKILL, out + err
    assert "internal error" not in err
    under.nothing_left()
