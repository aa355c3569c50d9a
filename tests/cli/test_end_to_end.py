"""The command as a process, with real guests: what users type, what comes back, and that nothing is left behind.

Everything runs on the model; what a plain VM can do runs on the machine's kernel too, where there is one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require

pytestmark = pytest.mark.gcc


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "vmm.cli", *argv]


def sevmm(tree: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(tree), **environ}
    return subprocess.run(command(*argv), env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


@pytest.fixture(params=["kernel", "model"])
def rung(request: pytest.FixtureRequest) -> str:
    require(request.config, {"kernel": "kvm", "model": "model"}[request.param])
    return str(request.param)


def test_hello(tree: Path, rung: str) -> None:
    done = sevmm(tree, "run", "hello", "--type", "plain", "--on", rung)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"rung        {rung}: " in done.stdout
    assert "result      pass, exit code 0, " in done.stdout


def test_arguments_and_several_vcpus(tree: Path, rung: str) -> None:
    done = sevmm(tree, "run", "hello", "--type", "plain", "--on", rung, "--vcpus", "2", "--arguments", "hi there", "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, data["result"], data["exit_code"], data["rung"]) == (0, "pass", 0, rung)
    assert data["launch"] is None
    assert data["exits"]["IO"] > 0


@pytest.mark.model
def test_private_memory_on_sev(tree: Path) -> None:
    """The main job."""
    done = sevmm(tree, "run", "private-memory", "--type", "sev", "--on", "model", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["result"] == "pass"
    assert data["launch"]["match"] is True
    assert data["launch"]["measure"] == data["launch"]["expected"]
    assert {conversion["to"] for conversion in data["conversions"]} == {"private", "shared"}
    assert {entry["state"] for entry in data["map"]} == {"private", "shared"}


@pytest.mark.model
def test_catalogue_chooses_the_type(tree: Path) -> None:
    data = json.loads(sevmm(tree, "run", "private-memory", "--on", "model", "--json").stdout)
    assert data["type"] == "sev"


def test_timeout(tree: Path, rung: str) -> None:
    done = sevmm(tree, "run", "spin", "--type", "plain", "--on", rung, "--timeout", "0.3")
    assert done.returncode == 124, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_interrupt(tree: Path, rung: str) -> None:
    """Ctrl-C while the guest spins: 130, one line, and the process is gone."""
    env = {**os.environ, "PYTHONPATH": str(tree)}
    argv = command("run", "spin", "--type", "plain", "--on", rung)
    with subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # the guest has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "sevmm: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["no-such-guest"], 2, "no-such-guest"),
        (["./no/such/file"], 2, "no/such/file"),
        (["fault", "--type", "sev-es", "--on", "kernel"], 2, "not on sev-es"),
        (["hello", "--type", "plain", "--on", "model", "--memory", "4096"], 2, "16"),
        (["hello", "--type", "plain", "--on", "model", "--policy", "3"], 2, "policy"),
    ],
)
def test_what_cannot_be_is_one_line(tree: Path, argv: list[str], code: int, words: str) -> None:
    done = sevmm(tree, "run", *argv)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert done.returncode == code, done.stderr


@pytest.mark.model
@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF" + b"\xff" * 200, bytes(4096)])
def test_corrupt_image(tree: Path, tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "bad.elf"
    image.write_bytes(content)
    done = sevmm(tree, "run", str(image), "--on", "model")
    assert done.returncode in (2, 70)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_no_compiler(tree: Path, tmp_path: Path) -> None:
    """No gcc, and no guest built before: how to get it, and nothing else."""
    done = sevmm(tree, "run", "hello", "--on", "model", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode in (4, 70)
    assert "apt install gcc" in done.stderr
    assert done.stderr.count("\n") == 1


def test_reader_gone_while_the_guest_runs(tree: Path, rung: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(tree)}
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        command("run", "hello", "--type", "plain", "--on", rung), env=env, stdout=writer, stderr=subprocess.PIPE
    ) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 141
    assert err == b""


def test_type_that_this_kernel_lacks(tree: Path) -> None:
    """`--on kernel` never falls back; it says what is missing, with kselftest's status for a skip."""
    from vmm.doctor import examine

    if examine().rung("sev").ok:
        pytest.skip("this kernel runs SEV guests; get it: a machine without SEV")
    done = sevmm(tree, "run", "hello", "--type", "sev", "--on", "kernel")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--on model" in done.stderr
