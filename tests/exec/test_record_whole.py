"""`sevmm exec --record` around the project's own VMM: a SEV launch with a secret, and a recording that tells everything but that."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.model, pytest.mark.gcc]

TREE = Path(__file__).parents[2]
SECRET = b"correct horse battery staple"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The recording, and what the guest printed."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "secret").write_bytes(SECRET)
    sevmm = [sys.executable, "-m", "vmm.cli"]
    inner = [*sevmm, "run", "secret", "--type", "sev", "--on", "kernel", "--secret", str(folder / "secret"), "--arguments", "nonce=n1"]
    done = subprocess.run(
        [*sevmm, "exec", "--record", str(folder / "log"), "--", *inner], cwd=TREE, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_bytes(), done.stdout


def test_a_new_file_is_its_owners_and_a_fifo_is_opened_once(tmp_path: Path) -> None:
    log, pipe = tmp_path / "log", tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "vmm.cli", "exec", "--record"]
    subprocess.run([*command, str(log), "--", "true"], cwd=TREE, timeout=60, check=True)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        try:
            subprocess.run([*command, str(pipe), "--", "true"], cwd=TREE, timeout=60, check=True)
            text = reader.communicate(timeout=10)[0]
        finally:
            reader.kill()
    assert [json.loads(line).get("end") for line in text.splitlines()][-1] == "complete"


def test_a_place_that_cannot_be_written_is_a_mistake() -> None:
    command = [sys.executable, "-m", "vmm.cli", "exec", "--record", "/dev/null/log", "--", "echo", "started"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sevmm exec: /dev/null/log cannot be written: not a directory\n"


def lines(recorded: tuple[bytes, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recorded[0].splitlines()]


def test_launch_is_told_step_by_step(recorded: tuple[bytes, str]) -> None:
    assert f"secret: {len(SECRET)} bytes arrived" in recorded[1]
    found = [line["command"] for line in lines(recorded) if "command" in line and line["result"] == 0]
    steps = ("KVM_SEV_INIT2", "KVM_SEV_LAUNCH_START", "KVM_SEV_LAUNCH_UPDATE_DATA", "KVM_SEV_LAUNCH_MEASURE", "KVM_SEV_LAUNCH_SECRET")
    at = [found.index(step) for step in (*steps, "KVM_SEV_LAUNCH_FINISH")]
    assert at == sorted(at)
    assert lines(recorded)[-1]["end"] == "complete"


def test_files_keep_their_numbers(recorded: tuple[bytes, str]) -> None:
    kinds: dict[int, set[str]] = {}
    for line in lines(recorded):
        if line.get("call") == "ioctl":
            kinds.setdefault(line["file"], set()).add(line["on"])
    assert all(len(found) == 1 for found in kinds.values())
    assert set().union(*kinds.values()) >= {"system", "vm", "vcpu", "sev"}


def test_exits_are_decoded(recorded: tuple[bytes, str]) -> None:
    exits = [line["exit"] for line in lines(recorded) if "exit" in line]
    assert {found["reason"] for found in exits} == {"IO"}
    assert bytes(int(found["data"], 16) for found in exits if found["port"] == "0x3f8" and found["size"] == 1).startswith(b"secret: ")


def test_no_payload(recorded: tuple[bytes, str]) -> None:
    log = recorded[0]
    for part in (SECRET[:8], SECRET.hex()[:16].encode(), SECRET[::-1].hex()[:16].encode()):
        assert part not in log
    secret = next(line for line in lines(recorded) if line.get("command") == "KVM_SEV_LAUNCH_SECRET")
    assert set(secret["in"]) == {"hdr_uaddr", "hdr_len", "guest_uaddr", "guest_len", "trans_uaddr", "trans_len"}
