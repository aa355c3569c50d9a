"""Processes that end, multiply, detach or change themselves while they use the model; and the supervisor's own end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.exec.conftest import Build
from tests.exec.launching import Under, read_line, soon

pytestmark = [pytest.mark.gcc, pytest.mark.model]


def started(under: Under, build: Build, *words: str) -> tuple[subprocess.Popen[str], int]:
    """`spin` whose guest runs: the process we started, and the pid that is in KVM_RUN."""
    process = under.start([build("spin"), *words])
    line = read_line(process)
    assert line.startswith("ready "), line
    return process, int(line.split()[1])


def ended(process: subprocess.Popen[str], under: Under) -> tuple[int, str, str]:
    """Status, stdout, stderr; nothing of it is left."""
    try:
        out, err = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        under.kill_all()
        raise AssertionError("it does not end") from None
    under.nothing_left()
    return process.returncode, out, err


STATUSES = [("exit 0", 0), ("exit 3", 3), ("kill -SEGV $$", -11), ("kill -KILL $$", -9), ("kill -TERM $$", -15)]


@pytest.mark.parametrize(("command", "status"), STATUSES)
def test_exit_statuses(side: Under, command: str, status: int) -> None:
    done = side.run("sh", "-c", command)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_programs_that_do_not_start(under: Under, tmp_path: Path) -> None:
    for name, mode, status in (("absent", None, 127), ("text", 0o644, 126)):
        if mode is not None:
            (tmp_path / name).write_text("no program")
            (tmp_path / name).chmod(mode)
        done = under.run(tmp_path / name)
        assert done.returncode == status and str(tmp_path / name) in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_missing_interpreter_is_named_as_the_reason(under: Under, tmp_path: Path) -> None:
    (script := tmp_path / "script").write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = under.run(script)
    assert done.returncode == 126
    assert done.stderr == f"sevmm exec: {script} cannot be executed: its interpreter or loader is missing\n"


@pytest.mark.parametrize("vcpus", ["1", "3"])
def test_killed_in_kvm_run(build: Build, side: Under, vcpus: str) -> None:
    process, pid = started(side, build, vcpus)
    os.kill(pid, signal.SIGKILL)
    assert ended(process, side)[0] == -signal.SIGKILL


def test_a_shell_sees_status_137(build: Build, under: Under) -> None:
    """The shell between the supervisor and the program says 128 + 9 as it would anywhere, and goes on."""
    process = under.start(["sh", "-c", f"{build('spin')} 1 & sleep 0.1; wait $!; echo status $?"])
    pid = int(read_line(process).split()[1])
    os.kill(pid, signal.SIGKILL)
    assert ended(process, under)[:2] == (0, "status 137\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_supervisor_reaches_the_program(build: Build, under: Under, number: signal.Signals) -> None:
    process, _ = started(under, build, "2")
    process.send_signal(number)
    assert ended(process, under)[0] == -number


def test_a_program_that_catches_it_ends_as_it_wants(build: Build, side: Under) -> None:
    process, _ = started(side, build, "1", "catch")
    process.send_signal(signal.SIGINT)
    assert ended(process, side)[:2] == (5, "run: -4\ncounted: 1\n")


def test_a_program_that_ignores_it_goes_on(build: Build, under: Under) -> None:
    process, pid = started(under, build, "1", "ignore")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    os.kill(pid, signal.SIGKILL)
    assert ended(process, under)[0] == -signal.SIGKILL


@pytest.mark.parametrize("how", ["", "fork", "ignore"])
def test_the_supervisor_is_killed(build: Build, under: Under, how: str) -> None:
    """With nobody to answer, what it ran ends too."""
    process, _ = started(under, build, "2", how)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    under.nothing_left()
    process.communicate()


def test_a_crowd_of_children(build: Build, nobody: tuple[str, ...]) -> None:
    """A fork bomb ends at the user's limit of processes."""
    under = Under("exec", before=nobody)
    under.run(build("forks"), "bomb", cwd=Path("/"))


@pytest.mark.parametrize("flags", [(), ("-static",)], ids=["dynamic", "static"])
def test_a_daemon_outlives_its_parents(build: Build, side: Under, flags: tuple[str, ...], tmp_path: Path) -> None:
    done = side.start([build("daemon", *flags), tmp_path / "log"])
    out, err = done.communicate(timeout=20)
    assert (done.returncode, err) == (0, ""), out
    assert soon(lambda: "wrong:" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else False)
    assert "wrong: 0" in (tmp_path / "log").read_text()
    side.nothing_left()


def test_a_setuid_program_gains_nothing(build: Build, nobody: tuple[str, ...]) -> None:
    """The filter needs no_new_privs: the program runs, as who started it."""
    suid = build("who").with_name("who-suid")
    shutil.copy(build("who"), suid)
    suid.chmod(0o4755)
    native = Under("native", before=nobody).run(suid, cwd=Path("/"))
    if "ids: 65534 0" not in native.stdout:
        pytest.skip("needs a file system that honours setuid; get it: TMPDIR on one that is not mounted nosuid")
    done = Under("exec", before=nobody).run(suid, cwd=Path("/"))
    assert done.returncode == 0 and "ids: 65534 65534" in done.stdout, done.stdout + done.stderr


def test_a_program_of_32_bits(build: Build, under: Under) -> None:
    """It runs; that /dev/kvm is not for it, it is told (programs/old.c: calls of 32 bits from 64-bit code)."""
    done = under.run(build("who", "-m32"))
    assert done.returncode == 0 and "ids: " in done.stdout


def test_nested(under: Under) -> None:
    """The kernel has one supervisor for a process: the second says so."""
    inner = under.command(["true"])
    done = under.run(*inner)
    assert done.returncode == 4 and "sevmm exec" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_a_program_is(build: Build, tmp_path: Path) -> None:
    """argv, signals and fds are as they would be without us; so is the environment."""
    words = (build("who"), "-x", "--", "", "two words", "*")
    native, ours = (Under(name).run(*words, cwd=tmp_path) for name in ("native", "exec"))
    assert (ours.stdout, ours.stderr) == (native.stdout, native.stderr)
    first, second = (Under(name, mark="same").run("env", cwd=tmp_path).stdout.splitlines() for name in ("native", "exec"))
    assert sorted(first) == sorted(second)
    assert Under("exec").run("cat", text="a line\n").stdout == "a line\n"


def test_fds_from_outside(under: Under) -> None:
    """What the shell opened for it is there; what we opened is not."""
    with open("/dev/null", "rb") as given:
        process = under.start(["ls", "/proc/self/fd"], pass_fds=(given.fileno(),))
        out = process.communicate(timeout=15)[0].split()
        ours = given.fileno()
    assert str(ours) in out and set(out) <= {"0", "1", "2", "3", str(ours), str(ours + 1)}
