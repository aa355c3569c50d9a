"""Programs that have nothing to do with KVM run under `sevmm exec` as they do without; debuggers work on those that have."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.exec.conftest import Build
from tests.exec.launching import TREE, Under, read_line, soon, terminal

pytestmark = [pytest.mark.gcc, pytest.mark.model]

PYTHON = """
import hashlib, multiprocessing, os, subprocess, sys, tempfile, threading
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "file")
    open(path, "w").write("x" * 100000)
    assert os.stat(path).st_size == 100000 and os.listdir(folder) == ["file"]
    os.symlink(path, path + "2")
    assert os.readlink(path + "2") == path and os.path.realpath(path + "2") == os.path.realpath(path)
    print(hashlib.sha256(open(path, "rb").read()).hexdigest())
threads = [threading.Thread(target=lambda: [os.stat("/") for _ in range(200)]) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(subprocess.run(["sh", "-c", "echo $((6 * 7)) | cat; exit 3"], capture_output=True))
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, range(-5, 5)))
try:
    open("/no/such/file")
except OSError as error:
    print(error)
sys.exit(9)
"""

MAKEFILE = "both: one.o two.o\n\t$(CC) -o $@ $^\n\t./both\n%.o: %.c\n\t$(CC) -O1 -c -o $@ $<\n"


def test_python(side: Under) -> None:
    done = side.run(sys.executable, "-c", PYTHON)
    assert (done.returncode, done.stderr) == (9, "")
    assert "42\\n" in done.stdout and "No such file" in done.stdout and "[5, 4, 3, 2, 1, 0, 1, 2, 3, 4]" in done.stdout


def test_shell(side: Under) -> None:
    script = (
        "set -e; f=$(mktemp); trap 'rm $f' EXIT; seq 1000 >$f; sort -n $f | tail -1; (exit 5) || echo $?; test -c /dev/null && echo yes"
    )
    done = side.run("sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1000\n5\nyes\n", "")


def test_make(side: Under, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make; get it: apt install make")
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / "one.c").write_text("int two(void);\nint main(void) { return two(); }\n")
    (tmp_path / "two.c").write_text('#include <stdio.h>\nint two(void) { return puts("made") < 0; }\n')
    done = side.run("make", "-j2", "-s", "-C", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


def need_gdb() -> None:
    if shutil.which("gdb") is None:
        pytest.skip("needs gdb; get it: apt install gdb")


def test_gdb_starts_the_program(build: Build, under: Under) -> None:
    """gdb holds the program by ptrace, so that the supervisor cannot: guest RAM works all the same."""
    need_gdb()
    done = under.run("gdb", "-batch", "-nx", "-ex", "run", "--args", build("ram"), "private", cwd=build("ram").parent)
    assert "wrong: 0" in done.stdout and "exited normally" in done.stdout, done.stdout + done.stderr


def test_gdb_stops_where_it_is_told(build: Build, under: Under) -> None:
    need_gdb()
    commands = ["-ex", "break run", "-ex", "run", "-ex", "bt 1", "-ex", "print m->run->exit_reason", "-ex", "delete", "-ex", "continue"]
    done = under.run("gdb", "-batch", "-nx", *commands, "--args", build("plain", "-g", "-O0"))
    assert re.search(r"^#0 .* run \(m=0x", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "wrong: 0" in done.stdout and "exited normally" in done.stdout, done.stdout


def test_gdb_attaches_to_a_running_guest(build: Build, under: Under) -> None:
    need_gdb()
    under = replace(under, options=("--cpuid", "host"))
    process = under.start([build("spin"), "2", "catch"])
    pid = int(read_line(process).split()[1])
    attach = ["gdb", "-batch", "-nx", "-p", str(pid), "-ex", "info threads", "-ex", "detach"]
    done = subprocess.run(attach, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL)
    assert "Thread" in done.stdout and "detached" in done.stdout, done.stdout + done.stderr
    assert process.poll() is None
    os.kill(pid, signal.SIGINT)
    assert process.wait(10) == 5
    process.communicate()
    under.nothing_left()


def test_a_terminal_is_the_programs(build: Build) -> None:
    seen = {}
    for name in ("native", "exec"):
        with terminal(under := Under(name), [build("who")]) as tty:
            seen[name] = tty.until("fds:")
            assert tty.ended() == 0
            under.nothing_left()
    assert seen["exec"] == seen["native"] and "terminal: 1 1 1" in seen["exec"] and "foreground: 1" in seen["exec"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_started_with_closed_streams(closed: str) -> None:
    """The program finds them closed, too, and what we would say goes nowhere: not to the stream that is open."""
    script = "n=10; for fd in 0 1 2; do test -e /proc/self/fd/$fd || n=$((n + 1)); done; exit $n"
    line = f"exec \"$0\" -m vmm.cli exec --verbose -- sh -c '{script}' {closed}"
    done = subprocess.run(["sh", "-c", line, sys.executable], cwd=TREE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 10 + closed.count("&-")
    assert done.stdout == ""
    assert ("looked at" in done.stderr) is ("2>" not in closed)


def test_control_c(build: Build, side: Under) -> None:
    """The terminal sends it to program and supervisor alike; the program decides."""
    with terminal(side, [build("spin"), "2"]) as tty:
        tty.until("ready")
        tty.type("\x03")
        assert tty.ended() == -signal.SIGINT
        side.nothing_left()
    with terminal(side, [build("spin"), "1", "catch"]) as tty:
        tty.until("ready")
        tty.type("\x03")
        assert tty.ended() == 5
        assert "run: -4" in tty.until("counted: 1")
        side.nothing_left()


def test_job_control(build: Build, under: Under) -> None:
    """A shell with a supervised job: Ctrl-Z stops it in KVM_RUN, fg goes on, Ctrl-C is the program's."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash; get it: apt install bash")
    native = Under("native", mark=under.mark)
    with terminal(native, ["bash", "--norc", "--noprofile", "-i"]) as tty:
        tty.type(" ".join(f"'{word}'" for word in under.command([build("spin"), "2", "catch"])) + "\n")
        tty.until("ready")
        tty.type("\x1a")
        tty.until("Stopped")
        tty.type("fg\n")
        assert soon(lambda: os.tcgetpgrp(tty.fd) != tty.process.pid), "the job is in the foreground"
        tty.type("\x03")
        tty.until("counted: 1")
        tty.type("echo status $?.\n")
        tty.until("status 5.")
        tty.type("exit\n")
        tty.ended()
    under.nothing_left()


def test_a_supervised_shell(side: Under) -> None:
    """An interactive shell under us has its own jobs."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash; get it: apt install bash")
    with terminal(side, ["bash", "--norc", "--noprofile", "-i"]) as tty:
        tty.type("sleep 100\n")
        tty.until("sleep 100")
        assert soon(lambda: "sleep" in side.survivors().values())
        tty.type("\x1a")
        tty.until("Stopped")
        tty.type("kill -KILL %1; jobs -l\n")
        assert soon(lambda: "sleep" not in side.survivors().values())
        tty.type("\n")
        tty.until("Killed")
        tty.type("exit 4\n")
        assert tty.ended() == 4
    side.nothing_left()
