"""The platform's file: one platform for many processes, private, replaced as a whole, and refused with words when it is damaged."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmapi.abi import psp
from kvmapi.cert_chain import Chain
from kvmapi.model.sev import store as stores
from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.store import Store, StoreError, StoreUnreachableError, default_path
from kvmapi.model.sev.vault import Vault
from tests.model.owners import Owner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "sevmm" / "platform"


def platform(path: Path) -> Identity:
    return Identity(Vault(), Store(path))


def status(call: Callable[[], object]) -> int:
    with pytest.raises(FirmwareError) as caught:
        call()
    return caught.value.status


def test_a_platform_survives_its_process(path: Path) -> None:
    first = platform(path)
    assert not path.exists(), "nothing is drawn before it is needed"
    assert not first.owned
    assert not path.exists()
    shown = first.export(), first.amd_certificates, first.chip_id
    again = platform(path)
    assert (again.export(), again.amd_certificates, again.chip_id) == shown
    assert all(link.ok for link in Chain.of(*again.export(), again.amd_certificates).links())
    assert again.sign_with_pek(b"x")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert sorted(os.listdir(path.parent)) == ["platform", "platform.lock"]


def test_each_sees_what_the_other_changed(path: Path) -> None:
    one, other = platform(path), platform(path)
    assert one.export() == other.export()
    for change in (one.pek_gen, other.pdh_gen, one.factory_reset):
        before = one.export()
        change()
        assert one.export() == other.export() != before
    owner = Owner()
    one.import_pek(owner.sign(one.csr()), owner.oca)
    assert other.owned
    assert platform(path).owned
    assert status(lambda: other.import_pek(owner.sign(other.csr()), owner.oca)) == psp.SEV_RET_ALREADY_OWNED


_RACER = """
import sys
from pathlib import Path
from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.store import Store
from kvmapi.model.sev.vault import Vault
identity = Identity(Vault(), Store(Path(sys.argv[1])))
sys.stdin.readline()
chip = identity.chip_id.hex()
for _ in range(5):
    identity.pdh_gen()
print(chip)
"""


def test_processes_that_start_at_once_make_one_platform(path: Path, tree: Path) -> None:
    command = [sys.executable, "-c", _RACER, str(path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree) for _ in range(3)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(set(said)) == 1
    found = platform(path)
    assert found.chip_id.hex() == said[0].strip()
    assert all(link.ok for link in Chain.of(*found.export()).platform_links())


# --- damage ----------------------------------------------------------------------------------------------------------


def _sealed(payload: bytes) -> bytes:
    """A file whose checksum is right."""
    return struct.pack("<8sII", stores.MAGIC, stores.VERSION, len(payload)) + hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: b"", "0 bytes"),
        (lambda d: d[:40], "40 bytes"),
        (lambda d: bytes(70000), "70000 bytes"),
        (lambda d: d[:-1], "checksum"),
        (lambda d: d + b"\0", "checksum"),
        (lambda d: d[:100] + bytes((d[100] ^ 1,)) + d[101:], "checksum"),
        (lambda d: d[:20] + bytes((d[20] ^ 1,)) + d[21:], "checksum"),
        (lambda d: b"X" + d[1:], "another kind"),
        (lambda d: d[:8] + b"\2\0\0\0" + d[12:], "version 2"),
        (lambda d: _sealed(d[48:-1]), "cut off"),
        (lambda d: _sealed(d[48:] + b"ABC"), "cut off"),
        (lambda d: _sealed(d[48:] + b"CHIP" + bytes(4)), "twice"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_remedy(path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    identity = platform(path)
    before, good = identity.export(), path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.raises(StoreError, match=words) as caught:
        Store(path).check()
    assert str(path) in str(caught.value)
    assert "move it away" in caught.value.remedy
    assert path.read_bytes() == damage(good), "nobody repairs it silently"
    assert status(platform(path).export) == psp.SEV_RET_SECURE_DATA_INVALID
    assert status(identity.pdh_gen) == psp.SEV_RET_SECURE_DATA_INVALID
    path.write_bytes(good)
    Store(path).check()
    assert identity.export() == before


def _parts(data: bytes) -> dict[bytes, bytes]:
    found, at = {}, 48
    while at < len(data):
        tag, size = struct.unpack_from("<4sI", data, at)
        found[tag] = data[at + 8 : at + 8 + size]
        at += 8 + size
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop(b"CEKC"),
        lambda p: p.pop(b"PDHK"),
        lambda p: p.pop(b"CHIP"),
        lambda p: p.update({b"CHIP": b"short"}),
        lambda p: p.update({b"PDHK": p[b"PEKK"]}),
        lambda p: p.update({b"PDHK": b"no key"}),
        lambda p: p.update({b"PDHC": b"no certificate"}),
    ],
)
def test_parts_that_make_no_platform(path: Path, change: Callable[[dict[bytes, bytes]], object]) -> None:
    platform(path).export()
    parts = _parts(path.read_bytes())
    change(parts)
    path.write_bytes(_sealed(b"".join(struct.pack("<4sI", tag, len(part)) + part for tag, part in parts.items())))
    assert status(platform(path).export) == psp.SEV_RET_SECURE_DATA_INVALID


def test_a_file_that_others_may_read(path: Path) -> None:
    platform(path).export()
    path.chmod(0o640)
    with pytest.raises(StoreError, match=f"others may read it .mode 0640.*chmod 600 {path}"):
        Store(path).check()


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink"])
def test_what_is_no_file(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True)
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "symlink": lambda: path.symlink_to("/etc/hostname")}[kind]()
    with pytest.raises(StoreError, match=str(path)):
        Store(path).check()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="XDG_STATE_HOME"):
        Store(tmp_path / "file" / "sevmm" / "platform").check()
    assert status(platform(tmp_path / "file" / "sevmm" / "platform").export) == psp.SEV_RET_HWSEV_RET_PLATFORM


def test_a_directory_of_somebody_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to be found out by permissions where the tests run as root."""
    platform(path).export()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreUnreachableError, match="permission denied") as caught:
        Store(path).check()
    assert "XDG_STATE_HOME" in caught.value.remedy


@pytest.mark.parametrize("call", ["rename", "write", "fsync"])
def test_a_full_disk_changes_nothing(path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = platform(path)
    before, data = identity.export(), path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        assert status(identity.factory_reset) == psp.SEV_RET_HWSEV_RET_PLATFORM
    assert path.read_bytes() == data
    assert sorted(os.listdir(path.parent)) == ["platform", "platform.lock"]
    assert identity.export() == before
    identity.factory_reset()


def test_a_file_that_goes_away_is_written_again(path: Path) -> None:
    identity = platform(path)
    chip = identity.chip_id
    path.unlink()
    assert identity.chip_id == chip
    identity.pdh_gen()
    assert platform(path).chip_id == chip


def test_a_leftover_of_a_dead_process_does_not_matter(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.with_name(f"platform.{os.getpid()}.new").write_bytes(b"half a platform")
    identity = platform(path)
    identity.export()
    assert platform(path).export() == identity.export()


def test_keys_are_wiped_from_what_was_read(path: Path) -> None:
    platform(path).export()
    record = Store(path).load()
    assert record is not None
    with record:
        view = record.parts[b"PDHK"]
        buffer = view.obj
        assert any(view)
        assert repr(record) == "Record(11 parts, never shown)"
    assert isinstance(buffer, bytearray)
    assert not any(buffer)


def test_where_the_command_line_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "sevmm" / "platform"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / ".local" / "state" / "sevmm" / "platform"
