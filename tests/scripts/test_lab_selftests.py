"""scripts/lab selftests without its machine: choosing, the table, a machine that ends, and the runner inside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("lab")


def test_choose() -> None:
    from lablib.selftests import choose
    from lablib.words import Failure

    names = ["vm_types_test", "x86/private_mem_a", "x86/private_mem_b", "x86/smm_test"]
    assert choose(names, []) == names
    assert choose(names, ["smm_test", "x86/private*"]) == names[1:]
    assert choose(names, ["vm_types_test", "vm_*"]) == names[:1]
    with pytest.raises(Failure, match="no selftest matches vmx"):
        choose(names, ["vm_*", "vmx"])


def test_table_takes_lines_in_any_pieces() -> None:
    from lablib.selftests import Table

    lines = [
        '{"start": "vm_types_test"}', '{"test": "vm_types_test", "verdict": "pass", "seconds": 0.1, "reason": ""}', "noise", "[1]", "null",
        '{"start": "x86/msrs_test"}', '{"test": "x86/msrs_test", "verdict": "fail", "seconds": 1, "reason": "status 254: w"}',
        '{"start": "x86/smm_test"}', '{"test": "x86/smm_test", "verdict": "hang", "seconds": 9.0}', '{"start": "z"}', '{"half',
    ]  # fmt: skip
    data = "\n".join(lines).encode()
    for size in (1, 7, len(data)):
        table = Table()
        for at in range(0, len(data), size):
            table.take(data[at : at + size])
        assert [row.test for row in table.rows] == ["vm_types_test", "x86/msrs_test", "x86/smm_test"]
        assert [row.verdict for row in table.rows] == ["pass", "fail", "hang"]
        assert table.running == "z"
        assert [row.bad for row in table.rows] == [False, False, True]
        assert table.summary() == "1 pass, 1 fail, 1 hang; 1 that TCG cannot pass"
        assert table.as_json()[1]["limit"]


def test_a_machine_that_ends_takes_one_test_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lablib import machine, selftests
    from lablib.words import Failure

    boots: list[list[str]] = []

    def run(box: object, job: Any, streams: Any, timeout: float) -> int:
        names = job.command[5:]
        boots.append(names)
        for name in names:
            streams.out(json.dumps({"start": name}).encode() + b"\n")
            if name == "panics":
                streams.out(b'{"test": "pan')
                raise Failure("the lab's machine ended before the job did\n  Kernel panic")
            streams.out(json.dumps({"test": name, "verdict": "hang" if name == "hangs" else "pass", "seconds": 1}).encode() + b"\n")
            if name == "hangs":
                return 0
        return 0

    monkeypatch.setattr(machine, "run", run)
    table = selftests.Table()
    box = machine.Machine(Path("k"), Path("i"))
    selftests.run(box, Path("/f"), ["a", "panics", "b", "hangs", "c"], 5, table, Path("/usr/bin/python3"))
    assert boots == [["a", "panics", "b", "hangs", "c"], ["b", "hangs", "c"], ["c"]]
    assert [row.test for row in table.rows] == ["a", "panics", "b", "hangs", "c"]
    assert [row.verdict for row in table.rows] == ["pass", "crash", "pass", "hang", "pass"]
    assert "Kernel panic" in table.rows[1].reason
    assert selftests.status_of(table) == 1


def test_reasons() -> None:
    from lablib.inside_selftests import reason_of

    failed = "Random seed: 1\n==== Test Assertion Failure ====\n  x.c:7: a == b\n  pid=1 tid=1 errno=4\n     1\t0x0000: main\n  2 != 3\n"
    assert reason_of("fail", failed) == "x.c:7: a == b | 2 != 3"
    assert reason_of("skip", "Random seed: 0x1\n1..0 # SKIP - Requirement not met: has_svm\n") == "Requirement not met: has_svm"
    assert reason_of("pass", "ok 1 a\nok 2 b\n") == "2 ok"


def test_runner_kills_the_whole_session(tmp_path: Path) -> None:
    """A test over its limit ends with its children, also with those in groups of their own."""
    from lablib import inside_selftests

    script = tmp_path / "stubborn"
    script.write_text('#!/bin/bash\nset -m\nsleep 300 &\necho $! >"$0.pid"\nwait\n')
    script.chmod(0o755)
    inside_selftests.WORK_FOLDER = str(tmp_path)
    record = inside_selftests.run_one(tmp_path, "stubborn", 1.0)
    assert record["verdict"] == "hang"
    child = int((tmp_path / "stubborn.pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and state(child) != "Z":
        assert time.monotonic() < deadline, "the child outlives its session"
        time.sleep(0.01)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
