"""An owner's session between the steps: saved for nobody else to read, never overwritten, and refused when it is not of one piece."""

import os
import stat
from pathlib import Path

import pytest

from kvmapi import certificates
from kvmapi import session_crypto as crypto
from kvmapi.abi import cert as c
from kvmapi.session import OwnerError, OwnerSession

VERSION = {"api_major": 0, "api_minor": 24, "build": 15}


@pytest.fixture
def owner() -> OwnerSession:
    pdh = certificates.make_cert(certificates.new_key().public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256)
    return OwnerSession.create(bytes(pdh), policy=0x5)


def same(a: OwnerSession, b: OwnerSession) -> bool:
    return (a.policy, a.dh_cert, a.session, a.tek, a.tik) == (b.policy, b.dh_cert, b.session, b.tek, b.tik)


def test_saved_files_are_other_tools_and_the_owners_alone(owner: OwnerSession, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "session"
    old = os.umask(0)
    try:
        owner.save(folder)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {"godh.cert": 2084, "launch_blob.bin": 128, "tek.bin": 16, "tik.bin": 16, "policy.txt": 4}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert (folder / "launch_blob.bin").read_bytes() == owner.session
    again = OwnerSession.load(folder)
    assert same(again, owner)
    measure = owner.expected_measure(bytes(32), bytes(16), **VERSION)
    with pytest.raises(OwnerError, match="verify"):
        again.seal_secret(b"x" * 16, measure)
    assert again.verify(measure, bytes(32), bytes(16), **VERSION)
    header, packet = again.seal_secret(b"x" * 16, measure)
    assert crypto.open_secret(owner.tek, owner.tik, header, packet, guest_len=16, measure=measure) == b"x" * 16


def test_another_tools_files_need_their_policy(owner: OwnerSession, tmp_path: Path) -> None:
    owner.save(tmp_path / "s")
    (tmp_path / "s" / "policy.txt").unlink()
    with pytest.raises(OwnerError, match=r"policy\.txt is not there: say which policy"):
        OwnerSession.load(tmp_path / "s")
    assert same(OwnerSession.load(tmp_path / "s", 5), owner)
    with pytest.raises(OwnerError, match="policy 0x4 do not belong together"):
        OwnerSession.load(tmp_path / "s", 4)


def test_a_session_is_never_overwritten(owner: OwnerSession, tmp_path: Path) -> None:
    owner.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OwnerError, match=r"holds a session already \(godh.cert, launch_blob.bin"):
        owner.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for name in before:
        if name != "tik.bin":
            (tmp_path / name).unlink()
    with pytest.raises(OwnerError, match=r"\(tik\.bin\)"):
        owner.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tik.bin"], "nothing was begun"


def test_a_link_that_lies_in_the_way_is_not_followed(owner: OwnerSession, tmp_path: Path) -> None:
    (tmp_path / "tek.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OwnerError, match=r"tek\.bin"):
        owner.save(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("tik.bin", b"short", "5 bytes, where 16 are expected"),
        ("tek.bin", bytes(17), "more bytes, where 16 are expected"),
        ("tik.bin", bytes(16), "do not belong together"),
        ("launch_blob.bin", bytes(128), "do not belong together"),
        ("godh.cert", bytes(2084), r"godh\.cert: certificate version 0"),
        ("policy.txt", b"\xff\xfe", "no policy in hex"),
        ("policy.txt", b"0x1ffffffff", "does not fit"),
        ("policy.txt", b"-5", "does not fit"),
    ],
)
def test_corrupt_files_are_named_and_show_no_key(owner: OwnerSession, tmp_path: Path, name: str, data: bytes, words: str) -> None:
    owner.save(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OwnerError, match=words) as caught:
        OwnerSession.load(tmp_path)
    assert owner.tik.hex() not in str(caught.value) and repr(owner.tik) not in str(caught.value)


def test_before_api_0_17_the_packet_leaves_the_measure_out(owner: OwnerSession) -> None:
    version = {"api_major": 0, "api_minor": 16, "build": 1}
    measure = owner.expected_measure(bytes(32), bytes(16), **version)
    assert owner.verify(measure, bytes(32), bytes(16), **version)
    header, packet = owner.seal_secret(bytearray(b"y" * 32), measure)
    assert crypto.open_secret(owner.tek, owner.tik, header, packet, guest_len=32, measure=None) == b"y" * 32
