#!/usr/bin/env python3
"""Make the virtual environment that `scripts/sevmm` and `scripts/test` use.

Runs under any Python of at least 3.11 with nothing installed. Steps:

1. take the lock beside the environment, so that of two first starts one works and the other waits;
2. look again: the other may have finished it;
3. remove what an interrupted attempt left, make the environment, install the dependencies that pyproject.toml names;
4. write `complete`, last.

The lock's descriptor is handed to pip too: should this process be killed, the lock holds until pip has ended as well,
and nobody removes the directory under it. All words go to stderr: stdout belongs to the command that will run.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

NETWORK_SIGNS = (
    "NewConnectionError", "Temporary failure in name resolution", "Name or service not known",
    "Network is unreachable", "Connection refused", "ConnectTimeoutError", "No route to host", "ProxyError",
    "Failed to establish a new connection",
)  # fmt: skip
NO_MATCH_SIGNS = ("No matching distribution found", "Could not find a version")


class Failure(Exception):
    """The environment cannot be made; the text says why and what to do."""


class Words:
    """Progress on stderr: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal = sys.stderr.isatty()

    def line(self, text: str) -> None:
        clear = "\r\x1b[K" if self.terminal else ""
        print(f"{clear}{self.name}: {text}", file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """Shown only on a terminal, and overwritten by the next."""
        if self.terminal:
            width = max(20, shutil.get_terminal_size().columns - 1)
            print(f"\r\x1b[K{self.name}: {text}"[: width + 4], end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def dependencies(tree: Path, kind: str) -> list[str]:
    """What to install for `kind`, from the tree's pyproject.toml, the only place that lists it."""
    try:
        project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
        wanted: list[str] = list(project["dependencies"])
        if kind == "dev":
            wanted += project["optional-dependencies"]["dev"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise Failure(f"{tree}/pyproject.toml does not say what to install: {error!r}") from error
    return wanted


def check_interpreter() -> None:
    """Debian splits off what makes virtual environments."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Failure(
            f"{sys.executable} cannot make virtual environments ({error})\n"
            f"get it: apt install python3-venv (or python{version}-venv), or set SEVMM_PYTHON to another interpreter"
        ) from error


def why_pip_failed(log: str, path: Path) -> str:
    """One cause in words, from pip's output, and where the rest is."""
    if any(sign in log for sign in NETWORK_SIGNS):
        return (
            f"the package index cannot be reached: no network, or a proxy is needed\n"
            f"get it: connect, or set PIP_INDEX_URL (a mirror), PIP_PROXY, or PIP_FIND_LINKS and PIP_NO_INDEX=1 "
            f"(a directory of wheels); details in {path}"
        )
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    if any(sign in log for sign in NO_MATCH_SIGNS):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"{errors[-1] if errors else 'a package was not found'}\n"
            f"the index may lack it for Python {version} on this machine: "
            f"try another SEVMM_PYTHON or PIP_INDEX_URL; details in {path}"
        )
    return f"{errors[-1] if errors else 'pip failed'}; details in {path}"


def run_pip(python: Path, wanted: list[str], lock_fd: int, words: Words, log_path: Path) -> None:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *wanted]
    lines: list[str] = []
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", pass_fds=(lock_fd,),
        ) as pip,
    ):  # fmt: skip
        if pip.stdout is not None:
            for line in pip.stdout:
                log.write(line)
                lines.append(line)
                if line.startswith(("Collecting", "Downloading", "Installing", "Building", "  Downloading")):
                    words.step(line.strip())
    words.clear()
    if pip.returncode != 0:
        raise Failure(why_pip_failed("".join(lines), log_path))


def make(tree: Path, venv_dir: Path, kind: str, words: Words) -> None:
    """Make the environment, or find that another process has."""
    parent = venv_dir.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(f"{venv_dir}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Failure(f"{parent}: {error.strerror}\nset XDG_CACHE_HOME to a directory that can be written") from error
    try:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words.line("another start is preparing the Python environment; waiting for it")
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
        complete = venv_dir / "complete"
        if complete.exists() and (venv_dir / "bin" / "python").exists():
            return
        wanted = dependencies(tree, kind)
        check_interpreter()
        words.line(f"first use: preparing a Python environment in {venv_dir} (once, {len(wanted)} packages)")
        if venv_dir.exists():
            shutil.rmtree(venv_dir)
        words.step("making the environment")
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(venv_dir)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, pass_fds=(lock_fd,),
        )  # fmt: skip
        if made.returncode != 0:
            text = (made.stdout + made.stderr).strip().splitlines()
            raise Failure(f"python -m venv failed: {text[-1] if text else 'no output'}\nget it: apt install python3-venv")
        run_pip(venv_dir / "bin" / "python", wanted, lock_fd, words, parent / f"{venv_dir.name}.log")
        partial = venv_dir / "complete.partial"
        partial.write_text("".join(f"{name}\n" for name in wanted))
        partial.rename(complete)
        words.line("the Python environment is ready")
    finally:
        os.close(lock_fd)


def main() -> int:
    parser = argparse.ArgumentParser(description="make the virtual environment of sevmm's launchers")
    parser.add_argument("--name", default="bootstrap", help="who speaks, in messages")
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--kind", choices=["run", "dev"], default="run")
    options = parser.parse_args()
    words = Words(options.name)
    try:
        make(options.tree, options.venv, options.kind, words)
    except Failure as failure:
        for line in str(failure).splitlines():
            words.line(line)
        return 70
    except OSError as error:
        words.line(f"the Python environment could not be made: {error}")
        return 70
    except KeyboardInterrupt:
        words.line("interrupted; the next start begins again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
