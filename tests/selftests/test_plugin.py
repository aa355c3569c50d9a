"""The pytest plugin, as a project of somebody else would use it: fixtures, markers, skips, --require, subtests, the suites."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Pytest = Callable[..., subprocess.CompletedProcess[str]]

OWN = """
import pytest
from vmm.selftests.api import Case, MachineFactory, Subtest, runs_on, skip

@pytest.mark.sev
@pytest.mark.sw_protected
def test_marked(case, machine):
    assert machine("hello").run(20).exit_code == 0

@runs_on("plain", dialects=("mainline", "upm-v6"), rungs=("model",))
def test_said(case): pass

def test_plain(case): assert case.type == "plain"

@pytest.mark.kvm
@pytest.mark.sev
def test_kernel_only(vm): pass

def test_parts(subtest):
    with subtest("first"): assert 1 == 2, "no"
    with subtest("second"): skip("nothing")

def test_skipped(subtest):
    with subtest("first"): skip("nothing here")

def test_skips(): skip("said so")

def test_notes(note): note("41 us each")

def test_other(tmp_path): pass
"""

pytestmark = [pytest.mark.model, pytest.mark.gcc]


@pytest.fixture
def run(tmp_path: Path, tree: Path) -> Pytest:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_own.py").write_text(OWN)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        start = f"import sys; sys.path.insert(0, {str(tree)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        options = ("-p", "vmm.selftests.plugin", "-p", "no:cacheprovider", "-rA", "-q")
        return subprocess.run(
            [sys.executable, "-c", start, *options, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return call


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """test -> PASSED, FAILED, ERROR; what is not there was skipped or left out."""
    return {name: word for word, name in re.findall(r"^(PASSED|FAILED|ERROR) \S*::(\S+)", done.stdout, re.MULTILINE)}


def test_own_tests_with_the_plugins_fixtures_and_markers(run: Pytest) -> None:
    done = run("test_own.py", "--sevmm-on", "model")
    assert outcomes(done) == {
        "test_marked[sw-protected]": "PASSED", "test_marked[sev]": "PASSED", "test_said[plain]": "PASSED",
        "test_said[plain-upm-v6]": "PASSED", "test_plain[plain]": "PASSED", "test_parts[plain]": "FAILED", "test_notes[plain]": "PASSED",
        "test_other": "PASSED",
    }, done.stdout  # fmt: skip
    assert "subtest first: no" in done.stdout and "41 us each" in done.stdout
    for reason in ("this test is for the kernel only", "nothing here", "said so"):
        assert re.search(rf"^SKIPPED .*{reason}", done.stdout, re.MULTILINE), done.stdout


def test_types_and_dialects_can_be_chosen(run: Pytest) -> None:
    done = run("test_own.py", "--sevmm-on", "model", "--sevmm-type", "sev", "-k", "marked or said")
    assert outcomes(done) == {"test_marked[sev]": "PASSED"} and "deselected" in done.stdout
    done = run("test_own.py", "--sevmm-on", "model", "--sevmm-dialect", "upm-v6")
    assert outcomes(done)["test_said[plain-upm-v6]"] == "PASSED" and "test_plain[plain]" not in outcomes(done)


def test_what_the_kernel_lacks_is_skipped_in_the_doctors_words_or_fails_where_it_is_required(run: Pytest) -> None:
    from vmm.doctor import reason_missing

    missing = reason_missing("sev")
    if missing is None:
        pytest.skip("this host runs SEV guests: nothing is missing; the test needs one that does not")
    assert f": {missing}" in run("test_own.py::test_kernel_only").stdout
    done = run("test_own.py", "-k", "kernel_only or plain", "--require", "sev")
    assert outcomes(done)["test_kernel_only[sev]"] == "ERROR" and f"--require sev, but this host lacks it: {missing}" in done.stdout
    assert "test_plain[plain]" in outcomes(done)
    assert "--require nonsense: not one of kvm, sev" in run("--require", "nonsense").stderr


def test_suites_are_collected_by_their_package_and_by_name(run: Pytest) -> None:
    for target in ("vmm.selftests.suites", "vmm.selftests.suites.example"):
        done = run("--pyargs", target, "--sevmm-on", "model", "-k", "example and flags")
        assert outcomes(done) == {"test_flags[plain]": "PASSED", "test_flags[sw-protected]": "PASSED"}, done.stdout


def test_the_plugin_is_an_entry_point_and_its_name_lets_it_be_named_too(tree: Path) -> None:
    """`-p vmm.selftests.plugin` and the entry point of an installed package must not register the same module twice."""
    import tomllib

    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"vmm.selftests.plugin": "vmm.selftests.plugin"}
