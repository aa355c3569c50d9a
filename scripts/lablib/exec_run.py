"""One selftest under `sevmm exec`: started in a session of its own, watched, and ended with everything it started.

Nothing of a test outlives it: when its time is up, when it was stopped (Ctrl-C), and when it ended by itself but left
something behind, every process of its session and every process that carries its mark in the environment gets SIGKILL. The
mark finds those that made a session of their own. Processes that a test leaves behind are a failure: the supervisor has to
wait for them.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lablib.exec_expect import Outcome
from lablib.inside_selftests import reason_of, verdict_of

MARK = "SEVMM_SELFTESTS_EXEC"
MOST_OUTPUT = 32 << 20
_CANNOT = "sevmm exec: this host cannot: "
_GRACE, _PATIENCE, _STEP = 1.0, 10.0, 0.05  # seconds


class HostCannot(Exception):
    """`sevmm exec` does not work here, so no test will; its words."""


class Stopped(Exception):
    """The run was interrupted."""


def run_one(prefix: Sequence[str], folder: Path, name: str, limit: float, stop: threading.Event) -> Outcome:
    """`prefix folder/name` to its end. HostCannot and Stopped as they say; else what it did."""
    token = secrets.token_hex(8)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sevmm-selftest-") as scratch, tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                [*prefix, str(folder / name)], cwd=scratch, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, MARK: token},
            )  # fmt: skip
        except OSError as error:
            return Outcome(name, "fail", 0.0, f"cannot be started: {error.strerror}")
        try:
            ended = _wait(process, start + limit, stop, output.fileno())
            seconds = round(time.monotonic() - start, 1)
            left = _settled(process.pid, token) if ended == "" else []
        finally:
            kill_all(process.pid, token)
            process.wait()
        if stop.is_set():
            raise Stopped
        text = _text(output.fileno())
    if ended and ended != "hang":
        return Outcome(name, "fail", seconds, ended)
    return _outcome(name, None if ended else process.returncode, seconds, text, left)


def _outcome(name: str, status: int | None, seconds: float, text: str, left: list[str]) -> Outcome:
    """`status` None: it was over its limit. The supervisor's own lines are the reason only where it failed itself."""
    own = [line for line in text.splitlines() if line.startswith(("sevmm exec: ", "sevmm: "))]
    for line in own:
        if line.startswith(_CANNOT):
            raise HostCannot(line.removeprefix(_CANNOT))
    verdict = "hang" if status is None else verdict_of(status)
    reason = reason_of(verdict, "\n".join(line for line in text.splitlines() if line not in own))
    if verdict == "fail":
        internal = next((line for line in own if "internal error" in line or status == 70), "")
        reason = f"status {status}: {internal or reason}"
    if left:
        return Outcome(name, "fail", seconds, f"{verdict}, but leaves processes behind: {', '.join(left)}")
    return Outcome(name, verdict, seconds, reason)


def _wait(process: subprocess.Popen[bytes], until: float, stop: threading.Event, output: int) -> str:
    """ "" when it ended; "hang" when its time is up, or another word on why it must end."""
    while not stop.is_set():
        try:
            process.wait(_STEP)
            return ""
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() >= until:
            return "hang"
        if os.fstat(output).st_size > MOST_OUTPUT:
            return f"prints without end: more than {MOST_OUTPUT >> 20} MiB"
    return "stopped"


def _text(output: int) -> str:
    """The beginning and the end of what it printed."""
    size = os.fstat(output).st_size
    half = 256 << 10
    data = os.pread(output, half, 0)
    if size > half:
        data += b"\n" + os.pread(output, half, max(half, size - half))
    return data.decode(errors="replace")


def _settled(leader: int, token: str) -> list[str]:
    """Names of the processes that are still there a while after the test ended."""
    until = time.monotonic() + _GRACE
    while left := survivors(leader, token):
        if time.monotonic() >= until:
            return sorted(_name(pid) for pid in left)
        time.sleep(_STEP)
    return []


def survivors(leader: int, token: str) -> list[int]:
    """Live processes of the session of `leader`, or with the mark `token`."""
    mark = f"{MARK}={token}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
            if fields[0] in (b"Z", b"X"):
                continue
            if int(fields[3]) == leader or mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
        except (OSError, IndexError, ValueError):
            continue  # it has ended meanwhile, or is somebody else's
    return found


def kill_all(leader: int, token: str) -> None:
    """SIGKILL until nothing of the test is left; what is dying is waited for."""
    until = time.monotonic() + _PATIENCE
    while (left := survivors(leader, token)) and time.monotonic() < until:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(_STEP)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
