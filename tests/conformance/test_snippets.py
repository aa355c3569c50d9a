"""Every snippet of machine code is what its assembly says, as GNU as understands it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conformance import snippets


def test_the_bytes_are_the_assembly(tmp_path: Path, tree: Path) -> None:
    if not shutil.which("as") or not shutil.which("objcopy"):
        pytest.skip("needs `as` and `objcopy`; get them: apt-get install binutils")
    for folder in ("conformance", "model"):
        for module in sorted((tree / "tests" / folder).glob("*.py")):
            importlib.import_module(f"tests.{folder}.{module.stem}")
    source = tmp_path / "all.s"
    written = list(snippets.WRITTEN)
    lines = [".intel_syntax noprefix"]
    for data, text, bits in written:
        lines += [f".code{bits}", text.replace(";", "\n"), f".balign 64, {0xCC:#x}", f'.ascii "{"-" * 64}"']
        assert len(data) <= 192
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["as", source, "-o", tmp_path / "all.o"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "all.o", tmp_path / "all.bin"], check=True)
    pieces = (tmp_path / "all.bin").read_bytes().split(b"-" * 64)
    for (data, text, _), piece in zip(written, pieces):
        assert piece.startswith(data) and not piece[len(data) :].strip(b"\xcc"), text
