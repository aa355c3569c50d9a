"""`sevmm selftest`: exit statuses, what is on stdout, what is refused."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import PATIENCE
from vmm.cli import main
from vmm.selftests import collect, runner
from vmm.selftests.collect import Item
from vmm.selftests.execute import Result
from vmm.selftests.subtests import PASS

SAMPLES, BROKEN = "tests.selftests.samples", "tests.selftests.broken"
Run = Callable[..., tuple[int, str, str]]
MODEL = ("--on", "model", "-j", "1")

pytestmark = pytest.mark.model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, package: str = SAMPLES) -> tuple[int, str, str]:
        monkeypatch.setattr(collect, "PACKAGE", package)
        code = main(["selftest", *arguments])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("patterns", "code"), [(["good"], 0), (["good.types", "bad.last"], 0), (["bad"], 1), (["good", "bad.bug"], 1), (["skipped"], 4)]
)
def test_exit_status(run: Run, patterns: list[str], code: int) -> None:
    assert run(*patterns, *MODEL)[0] == code


def test_the_table_and_what_failed_and_why_something_was_skipped(run: Run) -> None:
    _, out, err = run("good", "assertion", *MODEL)
    lines = [line.rstrip() for line in out.splitlines()]
    assert [line.split() for line in lines[:2]] == [["model", "model"], ["plain", "sev"]]
    assert any(line.split() == ["types", "ok", "ok"] for line in lines)
    assert any(line.split() == ["assertion", "FAIL"] for line in lines)
    assert "FAIL bad.assertion[plain] on model" in lines
    assert "    assert got == wanted, where got = 3, wanted = 0x1000 (bad.py:17)" in lines
    assert "    no moon; wait for one" in lines
    assert "note good.types[sev]: type sev ok 1 forged" in lines
    assert lines[-1].startswith("3 pass, 1 fail, 1 skip; 2 subtests; ")
    assert err == ""


def test_a_tests_text_cannot_steer_the_terminal(run: Run) -> None:
    code, out, _ = run("steers", *MODEL)
    assert code == 1 and "\x1b" not in out and "\\x1b]0;title\\x07 \\xdc80" in out


def test_ktap_on_stdout_is_complete_and_in_the_plans_order(run: Run) -> None:
    code, out, _ = run("--ktap", *MODEL)
    lines = out.splitlines()
    assert code == 1
    assert lines[:3] == ["KTAP version 1", "1..2", "  KTAP version 1"]
    assert [line for line in lines if line.startswith(("ok", "not ok"))] == ["not ok 1 bad", "ok 2 good"]
    assert "  not ok 7 hangs[plain] # TIMEOUT did not end within 0.3 s" in lines
    assert "  # ok 1 forged" in lines and "ok 1 forged" not in lines
    assert "  # note: type sev ok 1 forged" in lines
    assert "    ok 2 two not a directive # SKIP nothing to see" in lines
    assert lines[-1] == "# Totals: pass:4 fail:9 xfail:0 xpass:0 skip:1 error:0"


def test_json_is_one_object_and_junit_says_the_same(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.xml"
    code, out, _ = run("good", "--json", "--junit", str(file), *MODEL)
    data = json.loads(out)
    assert data["tests"][0]["notes"] == ["type plain ok 1 forged"]
    assert code == 0 and data["totals"] == {"pass": 3, "fail": 0, "skip": 1}
    assert [(test["test"], test["type"]) for test in data["tests"]] == [
        ("types", "plain"), ("types", "sev"), ("parts", "plain"), ("skipped", "plain"),
    ]  # fmt: skip
    assert ElementTree.parse(file).getroot().get("tests") == "4"


def test_list_runs_nothing(run: Run) -> None:
    code, out, _ = run("--list", "good")
    assert code == 0 and out.splitlines()[0].split(maxsplit=3) == ["good.types", "[plain,", "sev]", "Runs once on each type."]
    rows = json.loads(run("--list", "--json", "good.types")[1])
    assert rows == [{"suite": "good", "test": "types", "cases": ["plain", "sev"], "text": "Runs once on each type."}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "no test matches nosuch; there are the suites bad, good"),
        (["good", "--type", "sev-es"], "no selected test runs on type sev-es"),
        (["good", "--type", "sev", "--dialect", "upm-v6"], "no selected test runs on type sev and dialect upm-v6"),
        (["good", "--junit", "/nonexistent/x"], "/nonexistent/x cannot be written: no such file"),
        (["-j", "many"], "'many' is not a number of processes"),
        (["--timeout", "soon"], "'soon' is not a time"),
        (["--ktap", "--json"], "not allowed with"),
        (["--dialect", "klingon"], "invalid choice: 'klingon'"),
    ],
)
def test_usage(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_suite_that_cannot_be_imported_is_a_failure(run: Run) -> None:
    code, out, _ = run("--ktap", package=BROKEN)
    assert code == 1
    assert "  # the suite cannot be imported: ValueError: on purpose" in out.splitlines()
    assert "not ok 1 cannot_import" in out.splitlines()


def test_a_missing_package_is_told_once(tree: Path) -> None:
    """Not as a failure of each suite that needs it."""
    hidden = "import sys; sys.modules['pyroaring'] = None; from vmm.cli import main; sys.exit(main(['selftest', '--on', 'model']))"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, cwd=tree, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (70, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sevmm: the Python package 'pyroaring' is missing; get it: pip install pyroaring")


def test_in_this_process_for_a_debugger(run: Run) -> None:
    assert run("good", "--on", "model", "-j", "0")[0] == 0


def test_python_without_assertions_is_refused(tree: Path) -> None:
    command = [sys.executable, "-O", "-m", "vmm.cli", "selftest", "--list"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "takes the assertions out" in done.stderr


_START = (
    f"import sys; from vmm.selftests import collect; collect.PACKAGE = {SAMPLES!r}; from vmm.cli import main; sys.exit(main(sys.argv[1:]))"
)


def test_ctrl_c_ends_everything(tree: Path) -> None:
    command = [sys.executable, "-c", _START, "selftest", "--ktap", "--on", "model", "-j", "2", "bad.hangs", "good"]
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "KTAP version 1\n"
        workers = _wait_for_children(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20 * PATIENCE)
    assert process.returncode == 130 and "interrupted" in err and "Bail out!" in out
    deadline = time.monotonic() + 20 * PATIENCE  # one that was just being started ends by itself, when its pipe does
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.01)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


@pytest.fixture
def interrupted_after_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when two tests have ended."""

    def two(items: Sequence[Item], *_: object) -> Iterator[Result]:
        for item in items[:2]:
            yield Result.of(item, PASS)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", two)


@pytest.mark.usefixtures("interrupted_after_two")
def test_ctrl_c_shows_what_had_ended(run: Run, tmp_path: Path) -> None:
    code, out, err = run("good", "--junit", str(tmp_path / "out.xml"), *MODEL)
    assert code == 130
    assert any(line.split() == ["types", "ok", "ok"] for line in out.splitlines())
    assert out.splitlines()[-1].startswith("2 pass, 0 fail, 0 skip; ")
    assert err == "sevmm: interrupted: 2 of 4 tests had ended\n"
    assert ElementTree.parse(tmp_path / "out.xml").getroot().get("tests") == "2"


@pytest.mark.usefixtures("interrupted_after_two")
def test_ctrl_c_leaves_json_whole(run: Run) -> None:
    code, out, err = run("good", "--json", *MODEL)
    data = json.loads(out)
    assert (code, data["interrupted"], data["totals"]["pass"]) == (130, True, 2)
    assert "interrupted" in err


def _wait_for_children(pid: int) -> list[str]:
    deadline = time.monotonic() + 20 * PATIENCE
    while time.monotonic() < deadline:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(found) == 2:
            return found
        time.sleep(0.01)
    pytest.fail("no workers came")


def test_the_bar_is_on_a_terminal_only(tree: Path) -> None:
    command = [sys.executable, "-c", _START, "selftest", "--on", "model", "good"]
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}, check=False)
        os.close(theirs)
        shown = b""
        try:
            while piece := terminal.read(4096):
                shown += piece
        except OSError:
            pass  # how a terminal without another end says that there is no more
    assert done.returncode == 0 and b"4/4" in shown and b"\x1b" not in done.stdout
    piped = subprocess.run(command, cwd=tree, capture_output=True, check=False)
    assert piped.stderr == b""
