"""The command scripts/lab: arguments, status, clean; and one real start, where the lab is set up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.conftest import resolved

pytestmark = pytest.mark.usefixtures("lab")


def lab_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from lablib import main

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    try:
        return main.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["dance"], ["run"], ["run", "--"], ["run", "--timeout", "-3", "true"], ["run", "--cpus", "9", "true"],
        ["run", "--memory", "1M", "true"], ["run", "--memory", "lots", "true"], ["selftests", "--limit", "none"],
        ["status", "extra"], ["--timeout", "0", "test"],
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        lab_main(monkeypatch, *arguments)
    assert stop.value.code == 2


def test_arguments_of_others_stay_theirs() -> None:
    from lablib.main import parse

    options = parse(["--timeout", "60", "--cpus=1", "test", "-k", "x and y", "--memory", "--", "z"])
    assert (options.command, options.timeout, options.cpus, options.memory) == ("test", 60, 1, "4G")
    assert options.arguments == ["-k", "x and y", "--memory", "--", "z"]
    options = parse(["run", "--timeout", "5", "--", "ls", "-l", "--", "x"])
    assert (options.words, options.timeout) == (["ls", "-l", "--", "x"], 5)
    assert parse(["run", "ls", "-l"]).words == ["ls", "-l"]


@pytest.mark.parametrize("arguments", [["run", "true"], ["test", "-q"], ["selftests", "vm_types_test"]])
def test_without_setup_each_command_says_so(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab_main(monkeypatch, *arguments) == 69
    assert "scripts/lab setup" in capsys.readouterr().err


def played_cache() -> None:
    """A cache in which source, kernel and first process look done."""
    from lablib import initrd, kernel, source
    from lablib.cache import write_json

    for step, result in (
        (source.resolve_step(), resolved()), (kernel.kernel_step(resolved()), {"image_bytes": 1}), (initrd.init_step(), {"bytes": 1}),
    ):  # fmt: skip
        step.directory.mkdir(parents=True)
        write_json(step.directory / "complete.json", {"result": result})


def test_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lab: Path) -> None:
    from lablib import packages

    monkeypatch.setattr(packages, "missing", lambda *_: [])
    assert lab_main(monkeypatch, "status", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ready"]
    assert "scripts/lab setup" in report["reason"]
    assert not lab.exists(), "looking makes nothing"

    played_cache()
    assert lab_main(monkeypatch, "status", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    states = {part["name"]: part["state"] for part in report["parts"]}
    assert (states.pop("source"), states.pop("selftests")) == ("unneeded", "missing")
    assert states == {"packages": "ready", "resolve": "ready", "kernel": "ready", "init": "ready"}
    assert (report["ready"], report["reason"]) == (True, None)

    monkeypatch.setattr(packages, "missing", lambda *purposes: ["qemu-system-x86"] if "run" in purposes else [])
    assert lab_main(monkeypatch, "status") == 1
    out = capsys.readouterr().out
    assert "lacks qemu-system-x86" in out
    assert out.splitlines()[-1].startswith("the lab is not ready: packages")


def test_status_of_an_interrupted_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lablib import kernel, packages

    monkeypatch.setattr(packages, "missing", lambda *_: [])
    played_cache()
    step = kernel.kernel_step(resolved())
    (step.directory / "complete.json").rename(step.directory / "log")
    assert lab_main(monkeypatch, "status") == 1
    assert "kernel     partial" in capsys.readouterr().out


def test_clean(monkeypatch: pytest.MonkeyPatch, lab: Path) -> None:
    played_cache()
    for name in ("source-0/tree/x", "kernel-0/build/x"):
        (lab / name).mkdir(parents=True)
    kept = {path.name for path in lab.iterdir() if (path / "complete.json").exists()}
    assert lab_main(monkeypatch, "clean", "--source") == 0
    assert (lab / "source-0").is_dir()
    assert not (lab / "source-0/tree").exists()
    assert not (lab / "kernel-0/build").exists()
    assert lab_main(monkeypatch, "clean", "--old") == 0
    assert {path.name for path in lab.iterdir()} == kept
    assert lab_main(monkeypatch, "clean") == 0
    assert not lab.exists()


# -- the real thing -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_lab(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's words; skips where the lab is not set up."""
    monkeypatch.undo()
    command = [str(tree / "scripts" / "lab")]
    if os.environ.get("SEVMM_IN_LAB"):
        pytest.skip("needs the lab: this is its inside")
    status = subprocess.run([*command, "status", "--json"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if status.returncode != 0:
        reason = json.loads(status.stdout)["reason"] if status.stdout.startswith("{") else status.stderr.strip()
        pytest.skip(f"needs the lab: {reason}")
    return command


@pytest.mark.lab
@pytest.mark.slow
def test_lab_runs_a_command(real_lab: list[str], tree: Path) -> None:
    """Streams, status, /dev/kvm with SW_PROTECTED VMs, the tree; and nothing stays behind."""
    program = """
import fcntl, os, sys
word = sys.stdin.read()
kvm = os.open("/dev/kvm", os.O_RDWR)
types = fcntl.ioctl(kvm, 0xAE03, 235)  # KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES
open("pyproject.toml", "w").close()
print(word, types & 2, os.path.getsize("pyproject.toml"), os.environ["SEVMM_IN_LAB"])
print("words on stderr", file=sys.stderr)
sys.exit(7)
"""
    size = (tree / "pyproject.toml").stat().st_size
    command = [*real_lab, "run", "--timeout", "60", "--", "python3", "-c", program]
    done = subprocess.run(command, input="hello", capture_output=True, text=True, cwd=tree, check=False)
    assert (done.returncode, done.stdout) == (7, "hello 2 0 1\n"), done.stderr
    assert "words on stderr" in done.stderr
    assert (tree / "pyproject.toml").stat().st_size == size
    timed = subprocess.run([*real_lab, "run", "--timeout", "0.5", "--", "sleep", "60"], capture_output=True, text=True, check=False)
    assert timed.returncode == 124, timed.stderr
