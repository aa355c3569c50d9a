"""The platform's identity: its chain, what its keys do, and who may own it."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmapi import certificates as certs
from kvmapi.abi import cert as c
from kvmapi.abi import psp
from kvmapi.cert_chain import Chain
from kvmapi.model.sev import keys
from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.store import Store, StoreError
from kvmapi.model.sev.vault import Vault
from kvmapi.wiping import wipe
from tests.kvmapi.openssl import PSS, Judge, ecdsa, p384, rsa2048
from tests.model.owners import Owner

SIZE = 2084
CROWD = 1000
"""As many P-384 keys at rest (80 bytes) have no room in a vault (64 KiB)."""


def refused(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(FirmwareError) as caught:
        call(*arguments)
    return caught.value.status


def chain_of(identity: Identity) -> Chain:
    return Chain.of(*identity.export(), identity.amd_certificates)


@pytest.fixture
def identity() -> Identity:
    return Identity(Vault())


# --- the chain -------------------------------------------------------------------------------------------------------


def test_the_chain_holds_up_to_a_root_that_says_what_it_is(identity: Identity) -> None:
    chain = chain_of(identity)
    assert [str(link) for link in chain.links() if not link.ok] == []
    assert chain.root == b"SEVMM MODEL ROOT"
    assert chain.root not in certs.AMD_FAMILIES
    assert certs.parse_amd(chain.ask).key_id != certs.parse_amd(chain.ark).key_id
    assert not identity.owned
    assert (identity.pdh_certificate, identity.chain) == identity.export()


def test_openssl_accepts_every_signature(identity: Identity, tmp_path: Path) -> None:
    judge = Judge(tmp_path)
    pdh, (pek, oca, cek) = identity.pdh_certificate, (identity.chain[at : at + SIZE] for at in (0, SIZE, 2 * SIZE))
    ask, ark = identity.amd_certificates[:832], identity.amd_certificates[832:]
    first, second = slice(1052, None), slice(1572, None)
    assert judge(p384(pek), pdh[:1044], ecdsa(pdh[first]))
    assert judge(p384(oca), pek[:1044], ecdsa(pek[first]))
    assert judge(p384(cek), pek[:1044], ecdsa(pek[second]))
    assert judge(p384(oca), oca[:1044], ecdsa(oca[first]))
    assert judge(rsa2048(ask), cek[:1044], cek[1052:1308][::-1], *PSS)
    assert judge(rsa2048(ark), ask[:576], ask[576:][::-1], *PSS)
    assert judge(rsa2048(ark), ark[:576], ark[576:][::-1], *PSS)
    report = b"what an attestation report covers"
    assert judge(p384(pek), report, ecdsa(identity.sign_with_pek(report)))


def test_certificates_look_like_a_chips(identity: Identity) -> None:
    """Usages, algorithms and the order of signatures as in a real chip's chain (tests/kvmapi/naples.py)."""
    parts = [identity.pdh_certificate, *(identity.chain[at : at + SIZE] for at in (0, SIZE, 2 * SIZE))]
    seen = [
        (one.pubkey_usage, one.pubkey_algo, one.sig1.usage, one.sig1.algo, one.sig2.usage, one.sig2.algo)
        for one in map(certs.parse_cert, parts)
    ]
    assert seen == [
        (0x1003, 3, 0x1002, 2, 0x1000, 0), (0x1002, 2, 0x1001, 2, 0x1004, 2),
        (0x1001, 2, 0x1001, 2, 0x1000, 0), (0x1004, 2, 0x13, 1, 0x1000, 0),
    ]  # fmt: skip
    assert {(one.api_major, one.api_minor) for one in map(certs.parse_cert, parts)} == {(0, 24)}


def test_platforms_of_one_process_are_different_chips_of_one_root(identity: Identity) -> None:
    other = Identity(Vault())
    assert other.amd_certificates == identity.amd_certificates
    assert other.chip_id != identity.chip_id
    assert len(identity.chip_id) == 64
    theirs, ours = chain_of(other), chain_of(identity)
    assert all(getattr(theirs, name) != getattr(ours, name) for name in ("pdh", "pek", "oca", "cek"))


def test_nothing_shows_or_takes_the_keys_along(identity: Identity) -> None:
    identity.export()
    assert repr(identity) == "Identity(keys never shown)"
    with pytest.raises(TypeError, match="never leaves"):
        pickle.dumps(identity)


# --- what the keys do ------------------------------------------------------------------------------------------------


def test_both_sides_find_the_same_secret(identity: Identity) -> None:
    key = certs.new_key()
    mine = certs.make_cert(key.public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256)
    z = identity.shared_secret(bytes(mine))
    assert isinstance(z, bytearray)
    assert z == certs.shared_secret(key, certs.cert_key(certs.parse_cert(identity.pdh_certificate)))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: b"",
        lambda d: d[:-1],
        lambda d: d + b"\0",
        lambda d: bytes(SIZE),
        lambda d: b"\2" + d[1:],
        lambda d: d[:8] + b"\2" + d[9:],  # a PEK
        lambda d: d[:12] + b"\2" + d[13:],  # a key that signs
        lambda d: d[:16] + b"\1" + d[17:],  # another curve
        lambda d: d[:20] + bytes((d[20] ^ 1,)) + d[21:],  # no point
        lambda d: d[:20] + bytes(144) + d[164:],  # the point at infinity, or what would stand for it
    ],
)
def test_malformed_peers_are_invalid_certificates(identity: Identity, change: Callable[[bytes], bytes]) -> None:
    good = bytes(certs.make_cert(certs.new_key().public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256))
    assert refused(identity.shared_secret, change(good)) == psp.SEV_RET_INVALID_CERTIFICATE


# --- owners ----------------------------------------------------------------------------------------------------------


def test_an_owner_takes_the_platform_and_loses_it(identity: Identity) -> None:
    owner, before = Owner(), chain_of(identity)
    csr = identity.csr()
    assert csr[:1044] == before.pek[:1044]
    assert csr[1044:] == 2 * ((0x1000).to_bytes(4, "little") + bytes(516))
    identity.import_pek(owner.sign(csr), owner.oca)
    after = chain_of(identity)
    assert identity.owned
    assert all(link.ok for link in after.links())
    assert (after.oca, after.cek, after.pdh) == (owner.oca, before.cek, before.pdh)
    assert after.pek[:1044] == before.pek[:1044]
    assert refused(identity.import_pek, owner.sign(csr), owner.oca) == psp.SEV_RET_ALREADY_OWNED

    identity.pek_gen()
    again = chain_of(identity)
    assert not identity.owned
    assert all(link.ok for link in again.links())
    assert again.oca not in (owner.oca, before.oca)
    assert again.cek == before.cek


def test_an_owner_may_use_either_slot(identity: Identity) -> None:
    """What comes back has the owner's signature first and the chip's second, as a chip's own has."""
    owner = Owner()
    signed = owner.sign(identity.csr())
    identity.import_pek(signed[:1044] + signed[1564:] + signed[1044:1564], owner.oca)
    pek = certs.parse_cert(identity.chain[:SIZE])
    assert (pek.sig1.usage, pek.sig2.usage) == (c.SEV_USAGE_OCA, c.SEV_USAGE_CEK)
    assert all(link.ok for link in chain_of(identity).links())


def _at(data: bytes, at: int, change: int = 1) -> bytes:
    return data[:at] + bytes((data[at] ^ change,)) + data[at + 1 :]


@pytest.mark.parametrize(
    ("pek", "oca", "status"),
    [
        (lambda d: d[:-1], lambda d: d, psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: d, lambda d: d + b"x", psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: d, lambda d: _at(d, 8), psp.SEV_RET_INVALID_CERTIFICATE),  # no OCA's usage
        (lambda d: _at(d, 8), lambda d: d, psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: _at(d, 4), lambda d: d, psp.SEV_RET_INVALID_CERTIFICATE),  # not our request: another API version
        (lambda d: _at(d, 1052), lambda d: d, psp.SEV_RET_BAD_SIGNATURE),
        (lambda d: _at(d, 1044), lambda d: d, psp.SEV_RET_BAD_SIGNATURE),  # signed as something else
        (lambda d: d, lambda d: _at(d, 1052), psp.SEV_RET_BAD_SIGNATURE),
        (lambda d: d, lambda d: Owner().oca, psp.SEV_RET_BAD_SIGNATURE),
    ],
)
def test_bad_imports_change_nothing(identity: Identity, pek: Callable[[bytes], bytes], oca: Callable[[bytes], bytes], status: int) -> None:
    owner, before = Owner(), identity.export()
    signed = owner.sign(identity.csr())
    assert refused(identity.import_pek, pek(signed), oca(owner.oca)) == status
    assert (identity.export(), identity.owned) == (before, False)
    identity.import_pek(signed, owner.oca)


def test_another_platforms_request_is_not_ours(identity: Identity) -> None:
    owner = Owner()
    assert refused(identity.import_pek, owner.sign(Identity(Vault()).csr()), owner.oca) == psp.SEV_RET_INVALID_CERTIFICATE
    stale = owner.sign(identity.csr())
    identity.pek_gen()
    assert refused(identity.import_pek, stale, owner.oca) == psp.SEV_RET_INVALID_CERTIFICATE


@pytest.mark.parametrize(
    ("command", "new"),
    [("pdh_gen", {"pdh"}), ("pek_gen", {"pdh", "pek"}), ("factory_reset", {"pdh", "pek", "oca"})],
)
def test_what_each_command_replaces(identity: Identity, command: str, new: set[str]) -> None:
    before, chip = chain_of(identity), identity.chip_id
    getattr(identity, command)()
    after = chain_of(identity)
    assert {name for name in ("pdh", "pek", "oca", "cek", "ask", "ark") if getattr(before, name) != getattr(after, name)} == new
    assert all(link.ok for link in after.links())
    assert identity.chip_id == chip


def test_new_keys_take_the_place_of_old_ones_in_the_vault() -> None:
    """Old keys are wiped and their room used again: there is not room for half as many."""
    identity = Identity(Vault())
    identity.export()
    for _ in range(CROWD):
        identity.pdh_gen()
    identity.factory_reset()
    assert all(link.ok for link in chain_of(identity).links())


def test_keys_that_were_not_taken_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Identity(Vault(), Store(tmp_path / "platform"))
    before = identity.export()

    def fails(*_: object) -> None:
        raise StoreError(tmp_path, "no space left", "make room")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", fails)
        for _ in range(CROWD):
            assert refused(identity.pdh_gen) == psp.SEV_RET_HWSEV_RET_PLATFORM
    assert identity.export() == before
    identity.factory_reset()


def test_the_encoding_of_the_roots_key_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(keys, "wipe", lambda data: (seen.append(data), wipe(data)))
    keys.Root()
    assert len(seen) == 1
    assert len(seen[0]) > 1000
    assert not any(seen[0])


def test_a_full_vault_is_a_resource_limit_and_changes_nothing() -> None:
    vault = Vault()
    identity = Identity(vault)
    before = identity.export()
    held = []
    with pytest.raises(FirmwareError):
        while True:
            held.append(vault.hold(64))
    with pytest.raises(FirmwareError):
        while True:
            held.append(vault.hold(16))
    assert refused(identity.factory_reset) == psp.SEV_RET_RESOURCE_LIMIT
    assert identity.export() == before
    assert identity.sign_with_pek(b"still the same")


def test_threads_see_whole_states(identity: Identity) -> None:
    identity.export()
    broken: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            broken.extend(str(link) for link in Chain.of(*identity.export()).platform_links() if not link.ok)
            identity.sign_with_pek(b"x")

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        identity.pek_gen()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert broken == []
