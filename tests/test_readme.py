"""The README keeps its word: its commands exist, its files exist, it holds no path of somebody's machine."""

import re
import shlex
from pathlib import Path

from vmm.cli import parser


def commands(text: str) -> list[list[str]]:
    """Every `sevmm …` or `scripts/sevmm …` line of an indented block."""
    found = re.findall(r"^    (?:\$ )?(?:scripts/)?sevmm (.*?)(?:\s+#.*|\s+\|.*)?$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


def test_every_command_parses(tree: Path) -> None:
    found = commands((tree / "README.md").read_text())
    assert len(found) >= 6
    for argv in found:
        parser.parse(argv)


def test_files_exist(tree: Path) -> None:
    text = (tree / "README.md").read_text()
    for name in re.findall(r"`((?:scripts|docs|tests|kvmapi|vmm|guest|\.ci)/[\w./]*)`", text):
        assert (tree / name).exists(), name


def test_no_machine_paths(tree: Path) -> None:
    text = (tree / "README.md").read_text()
    assert not re.search(r"/(root|home|work|tmp)/", text)


def test_scripts_are_executable(tree: Path) -> None:
    for name in ("scripts/sevmm", "scripts/test", "scripts/bench", ".ci/run"):
        assert (tree / name).stat().st_mode & 0o111, name
