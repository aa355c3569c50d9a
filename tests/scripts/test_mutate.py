"""scripts/mutate: every mutation still applies and names tests that exist, a short run notices each of its mutations, and what is not
noticed, or cannot be tried, is said and is no success.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmm.selftests import collect


@pytest.fixture(autouse=True)
def scripts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tree / "scripts"))


def test_each_mutation_is_possible_and_has_tests() -> None:
    from mutatelib import hook
    from mutatelib.rules import MUTATIONS, SHORT

    names = [one.name for one in MUTATIONS]
    assert len(set(names)) == len(names) >= 20
    assert set(SHORT) <= set(names)
    for one in MUTATIONS:
        hook.check(one)
        for pattern in one.tests:
            assert collect.select([pattern])[0], f"{one.name}: no test matches {pattern}"


def test_only_the_process_that_installs_it_has_it(tree: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from mutatelib.hook import install\n"
        "install('unaligned-offset')\n"
        "from kvmapi.model.caller import Errno\n"
        "from kvmapi.model.memslots import Memslots, Request\n"
        "slots = Memslots(readonly_allowed=True)\n"
        "try:\n"
        "    slots.check(Request(0, 4, 0, 4096, 0, 5, 0x800, version=2))\n"
        "    print('taken')\n"
        "except Errno as refusal:\n"
        "    print(refusal.number)\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-P", "-c", text, str(tree), str(tree / "scripts")], capture_output=True, text=True, check=True
        ).stdout
        for text in (code, code.replace("install('unaligned-offset')\n", ""))
    ]
    assert said == ["taken\n", "22\n"]


def test_too_late_or_gone_is_said() -> None:
    from mutatelib import hook

    import kvmapi.model.memslots  # noqa: F401 -- so that it is too late

    with pytest.raises(hook.RuleGone, match="was imported before"):
        hook.install("unaligned-offset")
    gone = replace(hook.mutation("unaligned-offset"), old="a rule of yesterday")
    with pytest.raises(hook.RuleGone, match="0 times, expected 1"):
        hook.check(gone)


def test_the_hook_is_put_into_a_workers_source() -> None:
    from mutatelib import hook

    from vmm.selftests import worker

    source = hook.start("no-punch", worker.START)
    compile(source, "worker", "exec")
    assert source.index("sys.path[:] =") < source.index("install('no-punch')") < source.index("vmm.selftests.worker")


@pytest.mark.gcc
@pytest.mark.model
@pytest.mark.slow
def test_short(capsys: pytest.CaptureFixture[str]) -> None:
    """The short form for CI: one mutation of each kind."""
    from mutatelib.main import main
    from mutatelib.rules import SHORT

    status = main(["--short", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["state"]) for one in report["mutations"] if one["state"] != "noticed"] == []
    assert report["control"]["fault"] == ""
    assert report["totals"] == {"noticed": len(SHORT), "survived": 0, "broken": 0}
    assert status == 0


@pytest.mark.model
def test_one_that_nobody_notices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mutatelib import hook, main

    lost = replace(hook.mutation("unaligned-memfd"), tests=("vm_types.vm_types",))
    gone = replace(hook.mutation("overlap"), old="a rule of yesterday", tests=("vm_types.vm_types",))
    monkeypatch.setattr(main, "MUTATIONS", (lost, gone))
    assert main.main([]) == 1
    out = capsys.readouterr().out
    assert "SURVIVED  unaligned-memfd  0 of 1" in out
    assert "BROKEN    overlap" in out
    assert "0 noticed, 1 survived, 1 broken" in out


def result(name: str, word: str, text: str = "") -> dict[str, Any]:
    """A test in the report of `sevmm selftest --json`."""
    case = {"suite": "one", "test": name, "type": "sev", "dialect": "upm-v6"}
    return {**case, "result": word, "text": text, "subtests": [], "timed_out": text.startswith("did not end")}


def test_verdicts() -> None:
    from mutatelib.main import BROKEN, NOTICED, SURVIVED, state
    from mutatelib.trial import verdict

    failed, passed, skipped = result("a", "fail", "Traceback:\nthe end"), result("b", "pass"), result("c", "skip", "no compiler")
    noticed = verdict("x", {"tests": [passed, failed, skipped]}, 1)
    assert (state(noticed), noticed.noticed_by, noticed.text, noticed.tests) == (NOTICED, ["one.a[sev-upm-v6]"], "the end", 2)
    assert verdict("x", {"tests": [result("a", "fail", "did not end within 20 s\nstacks")]}, 1).text == "did not end within 20 s"
    assert state(verdict("x", {"tests": [passed]}, 0)) == SURVIVED
    assert state(verdict("x", {"tests": [skipped]}, 4)) == BROKEN
    assert state(verdict("x", {"tests": [passed, failed]}, 0)) == BROKEN
    assert state(verdict("x", {"tests": [result("import", "fail", "no such module")]}, 1)) == BROKEN


def test_tests_that_fail_anyway_notice_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mutatelib import main
    from mutatelib.trial import Verdict

    def tried(chosen: Any, *_: object) -> Any:
        return Verdict("", 3, ["one.a[sev]"], "why"), {one.name: Verdict(one.name, 3, ["one.a[sev]"]) for one in chosen}

    monkeypatch.setattr(main, "try_all", tried)
    assert main.main(["overlap"]) == 1
    assert "without any mutation these fail: one.a[sev]: why" in capsys.readouterr().out


def test_usage_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    from mutatelib.main import main

    assert main(["nothing-like-it"]) == 2
    assert main(["--list", "ghcb-*"]) == 0
    assert "ghcb-user" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["-j", "0"])
    assert stop.value.code == 2
