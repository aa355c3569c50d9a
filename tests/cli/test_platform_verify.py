"""`sevmm platform verify`: a verdict on somebody's files, link by link, without opening any device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kvmapi import naples
from tests.model.owners import Owner
from vmm import cli

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sevmm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run a command of `sevmm platform`: (exit status, stdout, stderr)."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def command(*argv: str | Path) -> tuple[int, str, str]:
        code = cli.main(["platform", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def put_real(place: Path) -> None:
    place.mkdir()
    for name, data in zip(("pdh", "pek", "oca", "cek", "ask", "ark"), naples.chain(), strict=True):
        (place / f"{name}.cert").write_bytes(data)


def test_a_real_chips_chain(sevmm: Command, tmp_path: Path) -> None:
    put_real(tmp_path / "chip")
    code, out, _ = sevmm("verify", tmp_path / "chip")
    assert code == 0
    assert out.count("good") == 7
    assert "not the model's; its key id is that of AMD's Naples root" in out and "AMD's published ARK" in out
    _, out, _ = sevmm("verify", tmp_path / "chip", "--json")
    found = json.loads(out)
    assert found["holds"] and found["root"]["kind"] == "naples"
    assert found["links"][0] == {"certificate": "PDH", "signer": "PEK", "ok": True, "fault": None, "words": ""}


def test_other_tools_files(sevmm: Command, tmp_path: Path) -> None:
    """A full export of sevctl is one file; AMD publishes ASK and ARK in one; sev-tool keeps PEK, OCA and CEK in one."""
    parts = naples.chain()
    (tmp_path / "full.sev").write_bytes(b"".join(parts))
    assert sevmm("verify", tmp_path / "full.sev")[0] == 0
    place = tmp_path / "tool"
    place.mkdir()
    (place / "pdh.cert").write_bytes(parts[0])
    (place / "cert_chain.cert").write_bytes(b"".join(parts[1:4]))
    (place / "ask_ark.cert").write_bytes(b"".join(parts[4:]))
    assert sevmm("verify", place)[0] == 0


@pytest.mark.parametrize(
    ("change", "link", "words"),
    [
        (lambda p: (p / "pek.cert").unlink(), "PDH <- PEK", "there is no PEK certificate"),
        (lambda p: (p / "cek.cert").write_bytes(b"short"), "CEK <- ASK", "malformed"),
        (lambda p: (p / "ask.cert").unlink(), "ASK <- ARK", "AMD publishes"),
        (lambda p: (p / "oca.cert").write_bytes(Owner().oca), "PEK <- OCA", "no valid signature of this OCA"),
    ],
)
def test_the_link_that_fails_is_named(sevmm: Command, tmp_path: Path, change: Callable[[Path], object], link: str, words: str) -> None:
    put_real(tmp_path / "chip")
    change(tmp_path / "chip")
    code, out, _ = sevmm("verify", tmp_path / "chip")
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith(link))
    assert "BAD" in line and words in line
    assert "does not hold" in out.splitlines()[-1]


def test_a_cek_without_amds_signature_is_explained(sevmm: Command, tmp_path: Path) -> None:
    put_real(tmp_path / "chip")
    cek = tmp_path / "chip" / "cek.cert"
    empty = (0x1000).to_bytes(4, "little") + bytes(516)
    cek.write_bytes(cek.read_bytes()[:1044] + 2 * empty)
    code, out, _ = sevmm("verify", tmp_path / "chip")
    assert code == 1
    assert "key server has the signed one" in out


def test_an_empty_directory_and_none(sevmm: Command, tmp_path: Path) -> None:
    code, _, err = sevmm("verify", tmp_path)
    assert code == 2 and "sevmm platform export" in err
    assert sevmm("verify", tmp_path / "nowhere")[0] == 2


def test_roots_are_told_apart(sevmm: Command, tmp_path: Path) -> None:
    sevmm("export", tmp_path / "model", "--on", "model")
    code, out, _ = sevmm("verify", tmp_path / "model")
    assert code == 0
    assert "SEVMM MODEL ROOT" in out and "no AMD chip's" in out
    put_real(tmp_path / "chip")
    ark = tmp_path / "chip" / "ark.cert"
    data = bytearray(ark.read_bytes())
    data[4:36] = b"another root id." * 2
    ark.write_bytes(data)
    _, out, _ = sevmm("verify", tmp_path / "chip", "--json")
    assert json.loads(out)["root"]["kind"] == "unknown"
