"""Saved launches: what is written is read, what is corrupt is refused in one sentence, and no other file is ever overwritten."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vmm import flat
from vmm.measure import Answer, Measurement, Setup, predict
from vmm.run import GuestRequest, run_guest
from vmm.saved_launch import SavedLaunchError, check_target, dumps, load, save

SETUP = Setup("flat", "sev-es", 7, 16 << 20, 2, b"\xff arguments")


@pytest.fixture
def saved() -> Measurement:
    answer = Answer((0, 24, 15), b"n" * 16, b"m" * 32)
    return replace(predict(SETUP, flat.image(flat.HALT)), kind="launch", answer=answer)


@pytest.mark.parametrize("parts", [{}, {"answer": None}, {"regions": None, "vmsas": None}, {"answer": Answer(None, bytes(16), bytes(32))}])
def test_round_trip(saved: Measurement, tmp_path: Path, parts: dict[str, Any]) -> None:
    what = replace(saved, **parts)
    save(what, tmp_path / "l.json")
    assert load(tmp_path / "l.json") == what
    assert [path.name for path in tmp_path.iterdir()] == ["l.json"], "no scratch file is left"


def test_the_schema(saved: Measurement) -> None:
    data = json.loads(dumps(saved))
    assert list(data) == ["sevmm_launch", "kind", "setup", "digest", "regions", "vmsas", "answer"]
    assert data["sevmm_launch"] == 1
    assert list(data["regions"][0]) == ["gpa", "size", "sha256", "pages"]
    assert data["vmsas"][1]["fields"]["rsi"] == 1
    assert data["answer"] == {"version": [0, 24, 15], "nonce": "6e" * 16, "measure": "6d" * 32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("digest"), "digest is missing"),
        (lambda d: d.update(sevmm_launch=2), "its version is 2, and this sevmm knows version 1 only"),
        (lambda d: d.update(digest="00"), "digest has 1 bytes, not 32"),
        (lambda d: d.update(digest=7), "digest is no hex"),
        (lambda d: d.update(kind="dream"), "kind is none of launch, prediction"),
        (lambda d: d.update(setup=[]), "setup is no JSON object"),
        (lambda d: d["setup"].update(type="plain"), "setup.type is none of sev, sev-es"),
        (lambda d: d["setup"].update(type=["sev"]), "setup.type is none of"),
        (lambda d: d["setup"].update(vcpus=True), "setup.vcpus is no integer from 1 to 64"),
        (lambda d: d["setup"].update(vcpus=1 << 70), "setup.vcpus is no integer"),
        (lambda d: d["setup"].update(policy=-1), "setup.policy is no integer"),
        (lambda d: d["setup"].update(arguments="x"), "setup.arguments is no hex"),
        (lambda d: d["setup"].update(guest=None), "setup.guest is no text"),
        (lambda d: d.update(regions={}), "regions is no list"),
        (lambda d: d["regions"].reverse(), "not above the one before it"),
        (lambda d: d["regions"][0].update(gpa=0x1001), "not of whole pages"),
        (lambda d: d["regions"][0].update(size=1 << 40), "pages has 2 hashes for 268435456 pages"),
        (lambda d: d["regions"][0]["pages"].__setitem__(1, "zz"), "regions[0].pages is no hex"),
        (lambda d: d["regions"].__setitem__(0, None), "regions[0] is no JSON object"),
        (lambda d: d["vmsas"][0].update(vcpu=1), "vmsas[0].vcpu is no integer from 0 to 0"),
        (lambda d: d["vmsas"][0]["fields"].update(rip="0x10"), "vmsas[0].fields.rip is no integer"),
        (lambda d: d["answer"].update(version=[1, 2]), "answer.version is not [API major, API minor, build]"),
        (lambda d: d["answer"].update(nonce=""), "answer.nonce has 0 bytes, not 16"),
    ],
)
def test_corrupt_values_are_named(saved: Measurement, tmp_path: Path, change: Callable[[Any], object], words: str) -> None:
    data = json.loads(dumps(saved))
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SavedLaunchError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: not a saved launch: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"7", b'{"sevmm_launch": 1}', b"[" * 100_000, b'{"launch": null}'])
def test_what_is_no_saved_launch_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(SavedLaunchError, match="not a saved launch"):
        load(path)


def test_files_that_are_not_there_or_too_big(tmp_path: Path) -> None:
    with pytest.raises(SavedLaunchError, match="no such file"):
        load(tmp_path / "nothing")
    with pytest.raises(SavedLaunchError, match="too big"):
        load("/dev/zero")
    with pytest.raises(SavedLaunchError):
        load("a\0b")


def test_every_truncation_is_refused(saved: Measurement, tmp_path: Path) -> None:
    text = dumps(saved)
    path = tmp_path / "cut.json"
    for end in range(0, len(text), 97):
        path.write_text(text[:end])
        with pytest.raises(SavedLaunchError):
            load(path)


def test_only_a_saved_launch_is_replaced(saved: Measurement, tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    path.write_text("")
    save(saved, path)
    other = replace(saved, digest=bytes(32))
    save(other, path)
    assert load(path) == other
    precious = tmp_path / "precious"
    precious.write_text("my novel")
    for target, words in (
        (precious, "the file that is there is no saved launch"),
        (tmp_path, "that is a folder"),
        (tmp_path / "no" / "where", "there is no folder"),
        (Path("/dev/null"), "that is no ordinary file"),
    ):
        with pytest.raises(SavedLaunchError, match=words):
            save(saved, target)
        with pytest.raises(SavedLaunchError, match=r"^cannot write"):
            check_target(target)
    assert precious.read_text() == "my novel"


# -- run --save-launch --------------------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_run_saves_its_launch_and_none_of_its_keys(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmapi.session import OwnerSession

    keys: list[bytes] = []
    owners: list[OwnerSession] = []
    create = OwnerSession.create.__func__  # type: ignore[attr-defined]

    def watched(cls: type[OwnerSession], pdh: bytes, policy: int) -> OwnerSession:
        owner: OwnerSession = create(cls, pdh, policy)
        keys.extend(bytes(bytearray(key)) for key in (owner.tek, owner.tik))  # copies: the launch wipes its own
        owners.append(owner)
        return owner

    monkeypatch.setattr(OwnerSession, "create", classmethod(watched))
    guest = flat.write(tmp_path, flat.load("rax", 0) + flat.exit_with_eax())
    path = tmp_path / "l.json"
    report = run_guest(GuestRequest(guest, "sev", host=model_host, memory=16 << 20, save_launch=str(path)))
    assert report.result == "pass", report.message
    found = load(path)
    assert report.launch is not None and found.answer is not None and found.answer.version is not None
    assert found.mac(keys[1], found.answer.nonce, found.answer.version) == report.launch.measure
    text = path.read_text() + report.dumps() + repr(report)
    assert keys and not any(key.hex() in text or repr(key) in text for key in keys)
    assert [owner.tek + owner.tik for owner in owners] == [bytes(32)]


@pytest.mark.model
def test_a_launch_that_cannot_be_saved_is_refused_before_it(model_host: Any, tmp_path: Path) -> None:
    guest = flat.write(tmp_path, flat.HALT)
    for type, target, words in (
        ("plain", "l.json", "not measured"),
        ("sev", "no/l.json", "no folder"),
        ("sev", "flat.bin", "no saved launch"),
    ):
        report = run_guest(GuestRequest(guest, type, host=model_host, memory=16 << 20, save_launch=str(tmp_path / target)))
        assert (report.exit_status, report.launch) == (2, None)
        assert words in report.message


@pytest.mark.model
def test_a_launch_that_could_not_be_saved_is_not_run(model_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SavedLaunchError("cannot write l.json: no space left on device")

    monkeypatch.setattr("vmm.saved_launch.save", refuse)
    guest = flat.write(tmp_path, flat.SPIN)
    report = run_guest(GuestRequest(guest, "sev", host=model_host, memory=16 << 20, save_launch=str(tmp_path / "l.json")))
    assert (report.result, report.message) == ("error", "cannot write l.json: no space left on device; the guest was not run")


@pytest.mark.model
def test_the_output_of_run_json_is_read_too(model_host: Any, tmp_path: Path) -> None:
    guest = flat.write(tmp_path, flat.load("rax", 0) + flat.exit_with_eax())
    report = run_guest(GuestRequest(guest, "sev", host=model_host, memory=16 << 20))
    path = tmp_path / "run.json"
    path.write_text(report.dumps())
    found = load(path)
    assert report.launch is not None
    assert (found.digest, found.regions, found.setup.policy) == (report.launch.digest, None, 3)
    assert found.answer == Answer(None, report.launch.nonce, report.launch.measure)
    path.write_text(run_guest(GuestRequest(guest, "plain", host=model_host, memory=16 << 20)).dumps())
    with pytest.raises(SavedLaunchError, match="launch is null"):
        load(path)
