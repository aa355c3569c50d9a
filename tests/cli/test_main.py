"""The outermost edge: usage errors are one line and status 2, an unexpected error is one line and 70, and no traceback is shown."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm import cli
from vmm.cli import guests, parser


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "VERB"),
        (["frob"], "frob"),
        (["run"], "GUEST"),
        (["run", "hello", "--memory", "64Q"], "64M"),
        (["run", "hello", "--type", "snp"], "snp"),
        (["run", "hello", "--on", "moon"], "moon"),
        (["run", "hello", "--vcpus", "0"], "1 to 64"),
        (["run", "hello", "--policy", "zz"], "hex"),
        (["run", "hello", "--timeout", "soon"], "seconds"),
        (["run", "hello", "--dialect", "upm-v6"], "sevmm selftest --dialect upm-v6"),
        (["run", "hello", "--dialect", "page-enc-v6"], "not built yet"),
        (["selftest", "--dialect", "page-enc-v6"], "attr-v11"),
        (["run", "hello", "--dialect", "x"], "no dialect"),
        (["run", "hello", "--mem", "64M"], "--mem"),
        (["run", "hello", "--gdb", "1"], "--gdb"),
        (["run", "hello", "--shell"], "--shell"),
        (["run", "hello", "--record", "f"], "--record"),
        (["run", "hello", "--map"], "--map"),
        (["completion", "fish"], "fish"),
    ],
)
def test_usage_is_one_line_and_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sevmm")
    assert words in err


def test_version_is_that_of_pyproject(capsys: pytest.CaptureFixture[str], tree: Path) -> None:
    assert cli.main(["--version"]) == 0
    version = capsys.readouterr().out.split()
    assert version[0] == "sevmm"
    assert f'version = "{version[1]}"' in (tree / "pyproject.toml").read_text()


@pytest.mark.parametrize("verb", ["doctor", "guests", "run", "completion"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert f"usage: sevmm {verb}" in capsys.readouterr().out


def test_unexpected_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def explode(_options: object) -> int:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(guests, "run", explode)
    monkeypatch.delenv("SEVMM_DEBUG", raising=False)
    assert cli.main(["guests"]) == 70
    assert capsys.readouterr().err == "sevmm: internal error: ZeroDivisionError: two lines (SEVMM_DEBUG=1 shows the traceback)\n"
    monkeypatch.setenv("SEVMM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["guests"])


def test_missing_package_names_the_remedy() -> None:
    text = cli.describe(ModuleNotFoundError("No module named 'unicorn'", name="unicorn"))
    assert "unicorn" in text
    assert "pip install" in text


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(guests, "run", interrupted)
    assert cli.main(["guests"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def sevmm(tree: Path, *argv: str, **options: object) -> "subprocess.Popen[str]":
    environ = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen([sys.executable, "-m", "vmm.cli", *argv], env=environ, text=True, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def test_reader_gone(tree: Path) -> None:
    """`sevmm guests | true`: the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with sevmm(tree, "guests", stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 141
    assert err == ""


def test_guests_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["guests"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == guests.names()
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_guests(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "private-memory" in out
    assert "sw-protected" in out


def test_completion_in_bash(tree: Path) -> None:
    """bash completes a bundled guest's name, and its path with the same key."""
    with sevmm(tree, "completion", "bash", stdout=subprocess.PIPE) as process:
        script, _ = process.communicate(timeout=30)
    program = script + '\nCOMP_WORDS=(sevmm run priv); COMP_CWORD=2; COMP_LINE="sevmm run priv"; COMP_POINT=14\n'
    program += '_shtab_sevmm; printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert "private-memory" in done.stdout.split(), done.stderr


def test_parser_knows_the_types_and_rungs_of_the_vmm() -> None:
    from vmm import rungs

    assert set(parser.TYPES) == set(rungs.TYPES)
    assert set(parser.RUNGS) == set(rungs.RUNGS)


def test_what_run_and_measure_share_is_the_same_option() -> None:
    def options(verb: str) -> dict[str, tuple[object, ...]]:
        verbs = next(action for action in parser.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
        found = verbs.choices[verb]._actions
        return {action.dest: (action.option_strings, action.default, action.type, action.metavar, action.help) for action in found}

    run, measure = options("run"), options("measure")
    for name in ("memory", "vcpus", "policy", "arguments"):
        assert run[name] == measure[name]


def test_importing_the_command_line_is_cheap(tree: Path) -> None:
    """The grammar alone must not import what verbs need."""
    code = "import sys, vmm.cli.parser as p; p.build_parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"rich", "unicorn", "cryptography", "pyroaring", "psutil", "elftools", "shtab", "kvmapi", "guest"}


def test_every_dialect_of_the_model_can_be_asked_for() -> None:
    from kvmapi.abi.dialects import DIALECTS
    from vmm.cli import parser

    assert {*parser.DIALECTS, *parser.TESTED_DIALECTS} == set(DIALECTS)
