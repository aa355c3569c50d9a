"""What a program inherits, and what reaches it from outside: limits, ignored signals, signals by pid, the end of its terminal."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exec.conftest import Build
from tests.exec.launching import Under, _take_terminal, read_line, terminal

pytestmark = [pytest.mark.gcc, pytest.mark.model]

BECOME = "import os, resource, signal, sys; {how}; os.execvp(sys.argv[1], sys.argv[1:])"
TELL = """
import signal, sys, time
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, lambda number, frame: (print("got", number), sys.exit(7)))
print("ready", flush=True)
time.sleep(20)
"""
NUMBERS = [signal.SIGALRM, signal.SIGPROF, signal.SIGIO, signal.SIGURG, signal.SIGPWR, signal.SIGUSR2, signal.SIGRTMIN + 3, signal.SIGRTMAX]


def after(how: str) -> tuple[str, ...]:
    """Words before a command: it is started by a process that has done `how` in Python."""
    return (sys.executable, "-c", BECOME.format(how=how))


@pytest.mark.parametrize("name", ["native", "exec"])
def test_children_are_not_to_be_told(name: str) -> None:
    """SIGCHLD is ignored by whoever starts us: the program's status is its own all the same, and SIGCHLD ignored there."""
    under = Under(name, before=after("signal.signal(signal.SIGCHLD, signal.SIG_IGN)"))
    done = under.run(sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGCHLD).name); exit(3)", limit=10)
    assert (done.returncode, done.stdout) == (3, "SIG_IGN\n")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["native", "exec"])
def test_signals_to_the_supervisor_are_the_programs(name: str, number: int) -> None:
    under = Under(name)
    process = under.start([sys.executable, "-c", TELL])
    assert read_line(process) == "ready\n"
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=15)
    assert (process.returncode, out) == (7, f"got {int(number)}\n")
    under.nothing_left()


@pytest.mark.parametrize("name", ["native", "exec"])
def test_an_alarm_set_before(name: str) -> None:
    """Of alarm(2) before exec(2) the program dies, or it catches it."""
    under = Under(name, before=after("signal.alarm(2)"))
    process = under.start([sys.executable, "-c", TELL])
    assert "got 14\n" in process.communicate(timeout=15)[0]
    assert process.returncode == 7


@pytest.mark.parametrize("name", ["native", "exec"])
def test_the_terminal_goes_away(name: str) -> None:
    """Started as the leader of its session, as by a terminal window: it is told by SIGHUP alone."""
    under = Under(name)
    ours, theirs = pty.openpty()
    command = under.command(["sh", "-c", "echo ready; exec sleep 100"])
    process = subprocess.Popen(
        command, env=under.environment(), stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: _take_terminal(theirs),  # noqa: PLW1509  # as in launching.terminal
    )  # fmt: skip
    try:
        os.close(theirs)
        assert b"ready" in os.read(ours, 100)
        os.close(ours)
        assert process.wait(10) == -signal.SIGHUP
        under.nothing_left()
    finally:
        under.kill_all()
        process.wait()


TAKE = """
import os, signal, subprocess
os.setpgid(0, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.tcsetpgrp(0, os.getpgrp())
subprocess.Popen(["sleep", "100"], start_new_session=True)
"""


def test_words_to_a_terminal_in_the_background(under: Under, tmp_path: Path) -> None:
    """`stty tostop`, and a program that has taken the foreground ends: what we say then does not stop us."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash; get it: apt install bash")
    (program := tmp_path / "take").write_text(TAKE)
    with terminal(Under("native", mark=under.mark), ["bash", "--norc", "--noprofile", "-i"]) as tty:
        tty.type("stty tostop\n" + " ".join(f"'{word}'" for word in under.command([sys.executable, program])) + "\n")
        tty.until("what it started still runs")
        under.kill_all()


def bounded(limit: int, soft: int, hard: int) -> tuple[str, ...]:
    return after(f"resource.setrlimit({limit}, ({soft}, {hard}))")


SOFT = [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, 1 << 30), (resource.RLIMIT_DATA, 100 << 20), (resource.RLIMIT_NOFILE, 16)]


@pytest.mark.parametrize(("limit", "size"), SOFT)
def test_a_programs_limit_is_not_ours(build: Build, limit: int, size: int) -> None:
    """Where the limit may be raised, we raise ours; the program keeps its own."""
    hard = resource.getrlimit(limit)[1]
    if 0 <= hard < 1 << 10:
        pytest.skip(f"needs a hard limit that leaves room; get it: raise limit {limit}")
    under = Under("exec", before=bounded(limit, size, hard))
    done = under.run(build("plain"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-500:]
    words = [sys.executable, "-c", f"import resource; print(resource.getrlimit({limit}))"]
    assert under.run(*words).stdout == f"({size}, {hard})\n"


HARD = [(resource.RLIMIT_AS, 200 << 20, "-v"), (resource.RLIMIT_DATA, 100 << 20, "-d"), (resource.RLIMIT_NOFILE, 16, "-n")]


@pytest.mark.parametrize(("limit", "size", "option"), HARD)
def test_a_limit_that_binds_us_is_named(build: Build, anyone: tuple[str, ...], limit: int, size: int, option: str) -> None:
    """The model refuses what it has no room for, and lives."""
    done = Under("exec", before=(*bounded(limit, size, size), *anyone)).run(build("plain"))
    assert done.returncode == 1 and "KVM_CREATE_VCPU: " in done.stdout, done.stdout + done.stderr
    assert done.stderr.startswith(f"sevmm exec: ulimit {option} binds the model"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_program_that_may_not_be_looked_into(build: Build, anyone: tuple[str, ...]) -> None:
    """It is executable, but not readable: we cannot serve it, and say so."""
    closed = build("plain").with_name("plain-closed")
    shutil.copy(build("plain"), closed)
    closed.chmod(0o711)
    os.chown(closed, 1, 1)
    done = Under("exec", before=anyone).run(closed)
    assert done.stderr.startswith("sevmm exec: a program may not be looked into"), done.stdout + done.stderr
    assert done.returncode in (0, 1) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("threads", range(1, 10))
def test_few_threads(build: Build, nobody: tuple[str, ...], threads: int) -> None:
    """Where the user's limit leaves none for us we say so; with those that we have at the start a guest runs."""
    limit = (*bounded(resource.RLIMIT_NPROC, threads, threads), *nobody)
    done = Under("exec", before=limit).run(build("plain"), limit=15, cwd=Path("/"))
    assert done.stderr == "" if done.returncode == 0 else "no more processes or threads can be started here" in done.stderr, done
    assert done.returncode in (0, 1, 4) and done.stderr.count("\n") == (done.returncode != 0), done.stderr
    assert done.returncode == 4 if threads < 3 else True
    assert done.returncode == 0 if threads > 8 else True


FEW = {"instances": ("0", 4, "max_user_instances"), "watches": ("2", 1, "max_user_watches")}


@pytest.mark.parametrize("what", FEW)
def test_little_inotify(build: Build, what: str) -> None:
    """A user's share of it is used up: the user reads which setting that is."""
    value, status, word = FEW[what]
    before = ("unshare", "-Ur", "sh", "-c", f'echo {value} >/proc/sys/user/max_inotify_{what} && exec "$@"', "sh")
    probe = subprocess.run([*before, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"needs user namespaces: {probe.stderr.strip()}; get it: sysctl user.max_user_namespaces=1000")
    done = Under("exec", before=before).run(build("plain"))
    assert done.returncode == status and word in done.stderr and done.stderr.count("\n") == 1, done.stderr
