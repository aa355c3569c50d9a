"""scripts/bench: the JSON has its keys, a miss is exit status 1, and its hand-made guests are the ELF files they should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

KEYS = ["name", "value", "unit", "target", "ok", "detail", "skipped"]
ENTRIES = {"exit_loop_vs_c", "model_out_us", "model_map_gpa_us", "hello_s", "gpamap_flips"}


@pytest.fixture
def bench(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchlib.main, with an argument list to run it by."""
    monkeypatch.syspath_prepend(str(tree / "scripts"))
    from benchlib import main

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *argv])
        return main.main()

    return run


def test_list(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list") == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= ENTRIES


def test_unknown_entry(bench: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        bench("--only", "luck")
    assert stop.value.code == 2


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (3.0, 1)])
def test_json_and_status(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float, status: int
) -> None:
    from benchlib.entry import ENTRIES as registry
    from benchlib.entry import Entry, Measured, Skipped

    def skip() -> Measured:
        raise Skipped("needs luck: none here; get it: wait")

    def explode() -> Measured:
        raise ZeroDivisionError("no trips")

    bench("--list")  # registers the real ones
    capsys.readouterr()
    monkeypatch.setitem(registry, "played", Entry("played", "us", 2, "", lambda: Measured(value)))
    monkeypatch.setitem(registry, "skipped", Entry("skipped", "us", 2, "", skip))
    assert bench("--only", "played", "--only", "skipped") == status
    out, err = capsys.readouterr()
    played, skipped = json.loads(out)["entries"]
    monkeypatch.setitem(registry, "broken", Entry("broken", "us", 2, "", explode))
    assert bench("--only", "broken") == 1
    assert "no trips" in json.loads(capsys.readouterr().out)["entries"][0]["detail"]["error"]
    assert list(played) == list(skipped) == KEYS
    assert (played["value"], played["ok"], played["skipped"]) == (value, status == 0, None)
    assert (skipped["value"], skipped["ok"]) == (None, None)
    assert "get it" in skipped["skipped"]
    assert ("MISSED" in err) == bool(status)


@pytest.mark.slow
def test_gpamap_flips_runs(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It measures; whether the target is met is for scripts/bench to say, on a quiet machine."""
    bench("--only", "gpamap_flips")
    entry = json.loads(capsys.readouterr().out)["entries"][0]
    assert entry["value"] > 0
    assert entry["detail"]["mib"] < 3


def test_guests_are_elf_files(bench: Any, tmp_path: Path) -> None:
    from benchlib import tiny
    from elftools.elf.elffile import ELFFile

    code = tiny.map_loop(7)
    with tiny.write_elf(tmp_path / "g.elf", code).open("rb") as file:
        elf = ELFFile(file)
        segment = next(elf.iter_segments())
        assert (elf.header.e_machine, elf.header.e_entry) == ("EM_X86_64", 0x100000)
        assert segment.header.p_vaddr == segment.header.p_paddr == 0x100000
        assert segment.data() == code
