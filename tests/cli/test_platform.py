"""`sevmm platform`: a platform that outlives the command, files that are never half written, and a verdict on a chain."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.sev import SevPlatform
from tests.model.owners import Owner
from tests.model.sev_guest import SevGuest
from vmm import cli, platform_files
from vmm.cli import platform as verb

pytestmark = pytest.mark.model

NAMES = ["ark.cert", "ask.cert", "cek.cert", "cert_chain.cert", "oca.cert", "pdh.cert", "pek.cert"]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state directory, for this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "sevmm" / "platform"


@pytest.fixture
def sevmm(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command of `sevmm platform`: (exit status, stdout, stderr)."""

    def command(*argv: str | Path) -> tuple[int, str, str]:
        code = cli.main(["platform", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


class Hardware:
    """A kernel with /dev/sev, as far as this verb can tell: the model behind it, without the model's own ways."""

    name = "kernel"

    def __init__(self, *, writable: bool = True, refused: int = 0) -> None:
        self.model = ModelHost(Platform())
        self.writable, self.refused = writable, refused

    def open(self, path: str, flags: int) -> int:
        if self.refused:
            raise OSError(self.refused, os.strerror(self.refused), path)
        if not self.writable and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return self.model.open(path, flags & ~os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        self.model.close(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        return self.model.ioctl(fd, request, arg)


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hardware]:
    def put(**how: Any) -> Hardware:
        made = Hardware(**how)
        monkeypatch.setattr("kvmapi.kernel.KernelHost", lambda: made)
        return made

    return put


# --- one platform for many commands ----------------------------------------------------------------------------------


def test_status_of_the_model(sevmm: Command, state: Path) -> None:
    code, out, err = sevmm("status", "--on", "model")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["platform", "model", "(asked", "for)"]
    for word in ("API 0.24, build 15", "INIT, 0 guests", "the platform itself", str(state)):
        assert word in out
    _, out, _ = sevmm("status", "--on", "model", "--json")
    found = json.loads(out)
    assert (found["rung"], found["state"], found["owned"], found["es"], found["guests"]) == ("model", "INIT", False, True, 0)
    assert (found["api_major"], found["api_minor"], found["build"]) == (0, 24, 15)
    assert len(bytes.fromhex(found["chip_id"])) == 64
    assert found["kept_in"] == str(state)


def test_a_platform_through_its_owners(sevmm: Command, tmp_path: Path) -> None:
    """Export, request, import, refusal, reset: each a process of its own as far as the platform knows."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert sevmm("export", first, "--on", "model")[0] == 0
    assert sorted(os.listdir(first)) == NAMES
    assert (first / "cert_chain.cert").read_bytes() == b"".join((first / f"{n}.cert").read_bytes() for n in ("pek", "oca", "cek"))

    owner, csr = Owner(), tmp_path / "pek_csr.cert"
    assert sevmm("csr", csr, "--on", "model")[0] == 0
    (tmp_path / "signed.cert").write_bytes(owner.sign(csr.read_bytes()))
    (tmp_path / "oca.cert").write_bytes(owner.oca)
    again = ("import", tmp_path / "signed.cert", tmp_path / "oca.cert", "--on", "model")
    assert sevmm(*again)[0] == 0
    assert "was imported" in sevmm("status", "--on", "model")[1]
    code, _, err = sevmm(*again)
    assert code == 1
    assert "ALREADY_OWNED" in err and "sevmm platform reset" in err

    assert sevmm("export", second, "--on", "model")[0] == 0
    assert (second / "oca.cert").read_bytes() == owner.oca
    assert (second / "cek.cert").read_bytes() == (first / "cek.cert").read_bytes()
    assert sevmm("verify", second)[0] == 0

    before = (second / "pdh.cert").read_bytes()
    assert sevmm("pdh-gen", "--on", "model")[0] == 0
    assert sevmm("export", second, "--on", "model", "--force")[0] == 0
    assert (second / "pdh.cert").read_bytes() != before
    code, out, _ = sevmm("reset", "--on", "model", "--yes", "--json")
    assert (code, json.loads(out)["reset"]) == (0, True)
    assert json.loads(sevmm("status", "--on", "model", "--json")[1])["owned"] is False


def test_bad_certificates_are_refused_in_words(sevmm: Command, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"x" * 2084)
    code, out, err = sevmm("import", junk, junk, "--on", "model")
    assert (code, out) == (1, "")
    assert "INVALID_CERTIFICATE" in err and err.count("\n") == 1


# --- reset asks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "said", "done"), [(True, "yes\n", True), (True, "y\n", False), (True, "", False), (False, "yes\n", False)]
)
def test_reset_asks(sevmm: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool, said: str, done: bool) -> None:
    import io

    sevmm("export", tmp_path / "a", "--on", "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    monkeypatch.setattr(verb, "is_terminal", lambda stream: terminal)
    code, _, err = sevmm("reset", "--on", "model")
    assert code == (0 if done else 2)
    assert ("Type yes" in err) == terminal
    assert ("--yes" in err) == (not done)
    sevmm("export", tmp_path / "b", "--on", "model")
    assert ((tmp_path / "a" / "pek.cert").read_bytes() != (tmp_path / "b" / "pek.cert").read_bytes()) == done


def test_guests_keep_the_platform(sevmm: Command, hardware: Callable[..., Hardware]) -> None:
    host = hardware()
    with SevGuest(host.model):
        code, _, err = sevmm("reset", "--yes")
        assert code == 1
        assert "EBUSY" in err and "guests" in err
        assert "WORKING, 1 guest" in sevmm("status")[1]
        assert sevmm("csr", "unused.cert")[0] == 1
        assert not Path("unused.cert").exists()
    assert sevmm("reset", "--yes")[0] == 0


# --- hardware, and what is missing -----------------------------------------------------------------------------------


def test_hardware_comes_first_and_gets_no_model_root(
    sevmm: Command, hardware: Callable[..., Hardware], tmp_path: Path, state: Path
) -> None:
    host = hardware()
    code, out, _ = sevmm("export", tmp_path / "out")
    assert code == 0
    assert "kernel (/dev/sev opens for reading and writing)" in out
    assert sorted(os.listdir(tmp_path / "out")) == [name for name in NAMES if name not in ("ask.cert", "ark.cert")]
    assert f"/cek/id/{SevPlatform(host.model).get_id().hex()}" in out
    assert not state.exists(), "the model's platform was not touched"
    code, out, _ = sevmm("verify", tmp_path / "out")
    assert code == 1
    assert "AMD publishes ask_ark.cert" in out


def test_a_reader_is_told_to_be_root(sevmm: Command, hardware: Callable[..., Hardware]) -> None:
    hardware(writable=False)
    code, out, _ = sevmm("status")
    assert code == 0 and "reading only" in out
    for action in (("reset", "--yes"), ("pdh-gen",), ("csr", "unused.cert")):
        code, out, err = sevmm(*action)
        assert (code, out) == (4, "")
        assert "EPERM" in err and "root" in err


def test_no_dev_sev(sevmm: Command, hardware: Callable[..., Hardware]) -> None:
    hardware(refused=errno.ENOENT)
    code, out, err = sevmm("status", "--on", "kernel")
    assert (code, out) == (4, "")
    assert "/dev/sev cannot be opened: no such file" in err and "--on model" in err
    code, out, _ = sevmm("status")
    assert code == 0
    assert "model (/dev/sev cannot be opened" in out


def test_a_home_that_cannot_be_written(sevmm: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    code, out, _ = sevmm("status", "--on", "model", "--json")
    found = json.loads(out)
    assert (code, found["kept_in"]) == (0, None)
    assert "keys are not kept" in found["rung_reason"] and "file" in found["rung_reason"]


def test_a_damaged_platform_is_named(sevmm: Command, state: Path, tmp_path: Path) -> None:
    sevmm("export", tmp_path / "a", "--on", "model")
    state.write_bytes(state.read_bytes()[:-1])
    code, out, err = sevmm("status", "--on", "model")
    assert (code, out) == (4, "")
    assert str(state) in err and "checksum" in err and "move it away" in err


# --- files -----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_without_force(sevmm: Command, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "oca.cert").write_text("mine")
    code, _, err = sevmm("export", place, "--on", "model")
    assert code == 2
    assert "oca.cert already" in err and "--force" in err
    assert (os.listdir(place), (place / "oca.cert").read_text()) == (["oca.cert"], "mine")
    assert sevmm("export", place, "--on", "model", "--force")[0] == 0
    assert sorted(os.listdir(place)) == NAMES
    assert sevmm("verify", place)[0] == 0


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, call: str, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(b"old")
    kept: Any = getattr(os, call)
    calls = []

    def second_fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return kept(*arguments)

    monkeypatch.setattr(os, call, second_fails)
    if call == ("replace", "link")[force]:
        platform_files.write(tmp_path, {"a": b"1", "b": b"2"}, force=force)
        assert calls == []
        return
    with pytest.raises(platform_files.FileProblemError, match="no space left"):
        platform_files.write(tmp_path, {"a": b"1", "b": b"2"}, force=force)
    left = {"old"} | ({"a"} if call == "replace" else set())
    assert set(os.listdir(tmp_path)) == left


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(bytes(16385)), "more than 16384"),
        (lambda p: p.mkdir(), "is a directory"),
    ],
)
def test_files_that_are_no_certificates(sevmm: Command, tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "pek")
    code, out, err = sevmm("import", tmp_path / "pek", tmp_path / "pek", "--on", "model")
    assert (code, out) == (2, "")
    assert words in err and str(tmp_path / "pek") in err


@pytest.mark.parametrize(
    "argv", [[], ["frob"], ["export"], ["import", "x"], ["verify"], ["verify", "x", "--on", "model"], ["reset", "--force"]]
)
def test_usage(sevmm: Command, argv: list[str]) -> None:
    code, out, err = sevmm(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("sevmm") and err.count("\n") == 1
