"""scripts/sevmm and scripts/bootstrap.py: the first start, the later ones, two at once, an interrupted one, and what is missing.

Most tests run the launcher from a small tree of its own whose one dependency is a wheel made here, so they need no network: pip is told to
look into a directory. One test, marked network, does what a user does on a fresh machine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

PYPROJECT = """\
[project]
name = "sevmm"
version = "9.9"
dependencies = ["tinydep==1.0"]
[project.optional-dependencies]
dev = ["tinydep"]
"""
FAKE_CLI = """\
import sys, tinydep
def main():
    print("fake", *sys.argv[1:], tinydep.VALUE)
    return 7
"""


@pytest.fixture
def small(tmp_path: Path, tree: Path) -> Path:
    """A tree with the real scripts, a vmm.cli that prints its arguments, and a dependency to be had from `wheels`."""
    root = tmp_path / "tree"
    (root / "vmm" / "cli").mkdir(parents=True)
    (root / "vmm" / "__init__.py").touch()
    (root / "vmm" / "cli" / "__init__.py").write_text(FAKE_CLI)
    (root / "pyproject.toml").write_text(PYPROJECT)
    shutil.copytree(tree / "scripts", root / "scripts")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tinydep-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinydep.py", "VALUE = 42\n")
        wheel.writestr("tinydep-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydep\nVersion: 1.0\n")
        wheel.writestr("tinydep-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinydep-1.0.dist-info/RECORD", "")
    return root


def environ(root: Path, **more: str) -> dict[str, str]:
    """A fresh HOME, offline pip, and this interpreter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SEVMM_", "XDG_", "PYTHON", "VIRTUAL_ENV"))}
    home = root.parent / "home"
    home.mkdir(exist_ok=True)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(root.parent / "wheels")}
    return {**kept, "HOME": str(home), "SEVMM_PYTHON": sys.executable, **offline, **more}


def launch(root: Path, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(root / "scripts" / "sevmm"), *argv], env=environ(root, **more), capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip


def venvs(root: Path) -> list[Path]:
    return sorted(path for path in (root.parent / "home" / ".cache" / "sevmm").glob("venv-*") if path.is_dir())


@pytest.mark.slow
def test_first_start_then_quiet(small: Path) -> None:
    first = launch(small, "a", "b c")
    assert (first.returncode, first.stdout) == (7, "fake a b c 42\n"), first.stderr
    assert "first use" in first.stderr
    assert (venvs(small)[0] / "complete").read_text() == "tinydep==1.0\n"
    second = launch(small, "--again")
    assert (second.returncode, second.stdout, second.stderr) == (7, "fake --again 42\n", "")
    assert not list(small.rglob("*.egg-info")), "nothing is written into the tree"
    link = small.parent / "link"
    link.symlink_to(small / "scripts" / "sevmm")
    linked = subprocess.run([str(link)], env=environ(small), capture_output=True, text=True, timeout=60, check=False)
    assert linked.stdout == "fake 42\n"


@pytest.mark.slow
def test_two_first_starts_at_once(small: Path) -> None:
    command = [str(small / "scripts" / "sevmm")]
    both = [subprocess.Popen(command, env=environ(small), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [7, 7], ended
    assert sum("first use" in err for _, err in ended) == 1, ended
    assert len(venvs(small)) == 1


@pytest.mark.slow
def test_killed_first_start_is_made_again(small: Path) -> None:
    command = [str(small / "scripts" / "sevmm")]
    with subprocess.Popen(command, env=environ(small), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (venvs(small) and (venvs(small)[0] / "bin" / "python").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (venvs(small)[0] / "complete").exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    again = launch(small)
    assert (again.returncode, again.stdout) == (7, "fake 42\n"), again.stderr


@pytest.mark.slow
def test_no_network_says_so(small: Path) -> None:
    done = launch(small, PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1", PIP_TIMEOUT="2")
    assert done.returncode == 70
    assert "no network" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (venvs(small)[0] / "complete").exists()


def test_interpreter_that_will_not_do(small: Path) -> None:
    done = launch(small, SEVMM_PYTHON="/bin/false")
    assert done.returncode == 70
    assert done.stderr == "sevmm: SEVMM_PYTHON=/bin/false is not a Python of version 3.11 or later\n"


def test_no_python_at_all(small: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "readlink"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = launch(small, SEVMM_PYTHON="", PATH=str(tools))
    assert done.returncode == 70
    assert "apt install python3 python3-venv" in done.stderr


def test_nowhere_to_keep_it(small: Path) -> None:
    done = launch(small, HOME="")
    assert done.returncode == 70
    assert "XDG_CACHE_HOME" in done.stderr
    (small.parent / "file").touch()
    done = launch(small, XDG_CACHE_HOME=str(small.parent / "file"))
    assert done.returncode == 70
    assert "XDG_CACHE_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def prepared(root: Path) -> None:
    """Put an environment in place that runs this interpreter: the launcher must take it as it is."""
    text = (root / "pyproject.toml").read_bytes() + sys.executable.encode()
    key = subprocess.run(["cksum"], input=text, capture_output=True, check=True).stdout.split()[0].decode()
    venv = root.parent / "home" / ".cache" / "sevmm" / f"venv-run-{key}"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "complete").touch()


def test_prepared_environment_is_only_executed(small: Path) -> None:
    prepared(small)
    (small / "vmm" / "cli" / "__init__.py").write_text("def main():\n    import sys\n    print(*sys.argv[1:])\n")
    done = launch(small, "x", "y")
    assert (done.returncode, done.stdout, done.stderr) == (0, "x y\n", "")


def test_current_directory_is_never_imported_from(small: Path, tmp_path: Path) -> None:
    prepared(small)
    (small / "vmm" / "cli" / "__init__.py").write_text("def main():\n    import json\n    print(json.__file__)\n")
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current directory')\n")
    done = subprocess.run(
        [str(small / "scripts" / "sevmm")], env=environ(small), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_start_costs_little(small: Path) -> None:
    """The launcher's own part: everything but the interpreter. Generous, as machines differ; scripts/bench measures the whole."""
    prepared(small)
    (small / "vmm" / "cli" / "__init__.py").write_text("def main():\n    pass\n")
    python = small.parent / "home" / ".cache" / "sevmm" / venvs(small)[0].name / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        launch(small)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


@pytest.fixture
def bootstrap(tree: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", tree / "scripts" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_venv_module(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(bootstrap.Failure, match="apt install python3-venv"):
        bootstrap.check_interpreter()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("WARNING: Retrying ... NewConnectionError('...')\nERROR: No matching distribution found for unicorn", "no network"),
        ("ERROR: No matching distribution found for unicorn==2.1.4", "SEVMM_PYTHON"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "No space left"),
        ("", "pip failed"),
    ],
)
def test_why_pip_failed(bootstrap: ModuleType, log: str, words: str) -> None:
    assert words in bootstrap.why_pip_failed(log, Path("/x.log"))


def test_dependencies_come_from_pyproject(bootstrap: ModuleType, tree: Path) -> None:
    run, dev = bootstrap.dependencies(tree, "run"), bootstrap.dependencies(tree, "dev")
    assert "unicorn==2.1.4" in run
    assert dev[: len(run)] == run
    assert any(name.startswith("pytest") for name in dev)


@pytest.mark.slow
@pytest.mark.network
def test_fresh_machine(tree: Path, tmp_path: Path) -> None:
    """The README's first command's first half: a new HOME, the real dependencies from the index."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(tree / "scripts" / "sevmm"), "guests"], env={**kept, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=600,
        stdin=subprocess.DEVNULL, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "private-memory" in done.stdout
    assert "first use" in done.stderr
