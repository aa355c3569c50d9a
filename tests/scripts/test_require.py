"""`--require`: a skip says what is missing and how to get it; the option turns it into a failure; unknown kinds are a usage error."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
import pytest

@pytest.mark.sev
def test_on_sev_hardware():
    pass

def test_leak(no_leaks):
    import os
    os.dup(0)
"""


def run(tree: Path, folder: Path, *options: str, select: str = "sev") -> subprocess.CompletedProcess[str]:
    (folder / "test_small.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-c", str(tree / "pyproject.toml"), "--rootdir", str(folder), "-p", "tests.conftest"]
    command += ["-p", "no:cacheprovider", "-k", select, *options, str(folder / "test_small.py")]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False)


def test_skip_says_how_to_get_it(tree: Path, tmp_path: Path) -> None:
    from vmm.doctor import reason_missing

    if reason_missing("sev") is None:
        assert "1 passed" in run(tree, tmp_path, "--require", "sev").stdout
        return
    skipped = run(tree, tmp_path)
    assert skipped.returncode == 0
    assert "needs sev: " in skipped.stdout
    assert "; get it: " in skipped.stdout
    for options in (["--require", "sev"], ["--require", "gcc,sev"], ["--require", "gcc", "--require", "sev"]):
        failed = run(tree, tmp_path, *options)
        assert failed.returncode == 1
        assert "--require sev, but it needs sev" in failed.stdout


def test_unknown_kind(tree: Path, tmp_path: Path) -> None:
    done = run(tree, tmp_path, "--require", "luck")
    assert done.returncode == 4
    assert "--require luck: not one of kvm, sev" in done.stderr


def test_leak_is_found(tree: Path, tmp_path: Path) -> None:
    done = run(tree, tmp_path, select="leak")
    assert done.returncode == 1
    assert "fds left open" in done.stdout


@pytest.mark.parametrize("kind", ["kvm", "sev", "sw_protected", "hypercall", "model", "gcc", "network"])
def test_every_kind_is_a_marker(kind: str, pytestconfig: pytest.Config) -> None:
    assert any(line.startswith(f"{kind}:") for line in pytestconfig.getini("markers"))
