"""What a user reads where the host forbids the supervisor: the setting that is missing, by name."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.exec import refusals


@pytest.fixture
def status(tmp_path: Path) -> Path:
    """A /proc/self/status of a process under a seccomp filter."""
    path = tmp_path / "status"
    path.write_text("Name:\tx\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n")
    return path


def release(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(refusals.os, "uname", type("uname", (), {"release": text}))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_container_is_told_its_setting(number: int, status: Path) -> None:
    text = str(refusals.install_refused(number, status))
    assert "a seccomp filter around this process" in text
    assert "--security-opt seccomp=unconfined" in text
    assert "seccompProfile" in text


def test_nested_supervisor() -> None:
    assert "another sevmm exec" in str(refusals.install_refused(errno.EBUSY))


def test_old_kernel_and_kernel_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release(monkeypatch, "5.10.0-28-amd64")
    assert "5.19 or later; Linux 5.10.0-28-amd64 is too old" in str(refusals.install_refused(errno.EINVAL))
    release(monkeypatch, "6.18.44")
    assert "CONFIG_SECCOMP_FILTER" in str(refusals.install_refused(errno.EINVAL))
    (tmp_path / "status").write_text("Seccomp:\t0\n")
    assert "CONFIG_SECCOMP_FILTER" in str(refusals.install_refused(errno.ENOSYS, tmp_path / "status"))


@pytest.mark.parametrize(("scope", "words"), [("3", "until a reboot"), ("2", "ptrace_scope=1"), ("0", "SYS_PTRACE")])
def test_yama(scope: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "scope").write_text(scope + "\n")
    assert words in str(refusals.memory_refused(errno.EPERM, tmp_path / "scope"))


def test_without_yama(tmp_path: Path) -> None:
    assert "EPERM" in str(refusals.memory_refused(errno.EPERM, tmp_path / "absent"))


_FORBID = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
def op(code, yes, no, k): return struct.pack("<HBBI", code, yes, no, k)
code = op(0x20, 0, 0, 0) + op(0x15, 0, 1, int(sys.argv[1])) + op(6, 0, 0, 0x50000 | int(sys.argv[2])) + op(6, 0, 0, 0x7FFF0000)
text = ctypes.create_string_buffer(code)
program = struct.pack("<H6xQ", 4, ctypes.addressof(text))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "vmm.cli", "exec", "--", "echo", "started"])
"""


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        (317, errno.EPERM, "a seccomp filter around this process forbids seccomp user notification: EPERM"),
        (317, errno.ENOSYS, "--security-opt seccomp=unconfined"),
        (310, errno.EPERM, "the program's memory cannot be reached: EPERM"),
        (310, errno.ENOSYS, "SYS_PTRACE"),
        (311, errno.EPERM, "the program's memory cannot be reached: EPERM"),
    ],
)
def test_as_a_container_forbids_it(call: int, number: int, words: str, tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORBID, str(call), str(number)], cwd=tree, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("sevmm exec: this host cannot: ")
    assert words in done.stderr
