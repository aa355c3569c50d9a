"""`sevmm exec --record` around the project's own VMM: a SEV launch with a secret, and a recording that tells everything but that."""

from __future__ import annotations

import json
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
