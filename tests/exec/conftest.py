"""The C programs of programs/, built once per session, and the two ways to run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.exec.launching import Under

PROGRAMS = Path(__file__).parent / "programs"
Build = Callable[..., Path]


@pytest.fixture(scope="session")
def shelf() -> Iterator[Path]:
    """A directory that every user may read; pytest's own are ours alone."""
    with tempfile.TemporaryDirectory(prefix="sevmm-exec-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def build(shelf: Path) -> Build:
    """build(name, *flags): programs/name.c as an executable."""
    made: dict[tuple[str, ...], Path] = {}

    def one(name: str, *flags: str) -> Path:
        if (name, *flags) not in made:
            target = shelf / "".join((name, *flags))
            command = ["gcc", "-O1", "-w", "-pthread", *flags, "-o", str(target), str(PROGRAMS / f"{name}.c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                what, why = " ".join(flags) or "C", done.stderr.strip().splitlines()[-1]
                pytest.skip(f"needs a gcc that builds programs ({what}): {why}; get it: apt install gcc libc6-dev linux-libc-dev")
            made[(name, *flags)] = target
        return made[(name, *flags)]

    return one


@pytest.fixture
def under() -> Under:
    """`sevmm exec` without options."""
    return Under("exec")


@pytest.fixture(params=["native", "exec"])
def side(request: pytest.FixtureRequest) -> Under:
    """On the machine's own /dev/kvm, and under `sevmm exec`: the same must be seen."""
    if request.param == "native":
        require(request.config, "kvm")
    return Under(request.param)


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--")
POWERLESS = ("setpriv", "--securebits=+noroot", "--bounding-set=-all", "--inh-caps=-all", "--")  # root's files, and no capability


def _refused(words: tuple[str, ...]) -> str:
    """Why a program cannot run under us as that user; empty: it can."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return "needs root, to become somebody else, and setpriv; get it: run as root, apt install util-linux"
    probe = Under("exec", before=words)
    done = subprocess.run(probe.command(["true"]), env=probe.environment(), capture_output=True, text=True, check=False, cwd="/")
    return f"that user may not read this tree or this Python: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else ""


@pytest.fixture(scope="session")
def nobody() -> tuple[str, ...]:
    """The words that make us a user without rights, who can run this Python and read the project."""
    if why := _refused(NOBODY):
        pytest.skip(why)
    return NOBODY


@pytest.fixture(scope="session")
def anyone() -> tuple[str, ...]:
    """The same; where that user can read nothing here, root without a capability."""
    for words in (NOBODY, POWERLESS):
        if not (why := _refused(words)):
            return words
    pytest.skip(why)
