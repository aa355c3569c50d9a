"""Where a guest may be sent: what SEND_START asks of the other platform's certificates, by the guest's policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmapi import certificates as certs
from kvmapi.abi import cert as c
from kvmapi.abi import psp, sev
from kvmapi.cert_chain import Chain
from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.vault import Vault
from tests.model.owners import Owner

SIZE = 2084


def _at(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


@pytest.fixture
def identity() -> Identity:
    return Identity(Vault())


@pytest.fixture
def peer() -> Identity:
    return Identity(Vault())


def verdict(identity: Identity, peer: Identity, policy: int = 0, **other: bytes) -> int:
    """The status of validate_peer; `other` replaces a part of what the peer shows."""
    shown = {"plat_certs": peer.chain, "amd_certs": peer.amd_certificates, "pdh": peer.pdh_certificate, **other}
    try:
        identity.validate_peer(shown["plat_certs"], shown["amd_certs"], shown["pdh"], policy)
    except FirmwareError as refusal:
        return refusal.status
    return psp.SEV_RET_SUCCESS


def test_a_peer_of_the_same_root_may_have_the_guest(identity: Identity, peer: Identity) -> None:
    for policy in (0, sev.SEV_POLICY_SEV, 24 << 24, sev.SEV_POLICY_NODBG):
        assert verdict(identity, peer, policy) == psp.SEV_RET_SUCCESS


def test_the_policy_wants_a_version(identity: Identity, peer: Identity) -> None:
    assert verdict(identity, peer, 25 << 24) == psp.SEV_RET_POLICY_FAILURE
    assert verdict(identity, peer, 1 << 16) == psp.SEV_RET_POLICY_FAILURE


def test_a_domain_is_one_owner(identity: Identity, peer: Identity) -> None:
    assert verdict(identity, peer, sev.SEV_POLICY_DOMAIN) == psp.SEV_RET_POLICY_FAILURE
    assert verdict(identity, identity, sev.SEV_POLICY_DOMAIN) == psp.SEV_RET_SUCCESS
    owner = Owner()
    for platform in (identity, peer):
        platform.import_pek(owner.sign(platform.csr()), owner.oca)
    assert verdict(identity, peer, sev.SEV_POLICY_DOMAIN | sev.SEV_POLICY_SEV) == psp.SEV_RET_SUCCESS


@pytest.mark.parametrize("part", ["plat_certs", "pdh"])
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda d: b"", psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: d[:-1], psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: d + d, psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: _at(d, 8), psp.SEV_RET_INVALID_CERTIFICATE),
        (lambda d: _at(d, 200), psp.SEV_RET_BAD_SIGNATURE),
        (lambda d: _at(d, 1052), psp.SEV_RET_BAD_SIGNATURE),
    ],
)
def test_a_broken_chain_keeps_the_guest_here(
    identity: Identity, peer: Identity, part: str, change: Callable[[bytes], bytes], status: int
) -> None:
    good = peer.chain if part == "plat_certs" else peer.pdh_certificate
    assert verdict(identity, peer, 0, **{part: change(good)}) == status


def test_a_mixed_chain_is_none(identity: Identity, peer: Identity) -> None:
    assert verdict(identity, peer, pdh=identity.pdh_certificate) == psp.SEV_RET_BAD_SIGNATURE
    mixed = peer.chain[: 2 * SIZE] + identity.chain[2 * SIZE :]
    assert verdict(identity, peer, plat_certs=mixed) == psp.SEV_RET_BAD_SIGNATURE


def test_amds_side_counts_only_with_the_sev_bit(identity: Identity, peer: Identity) -> None:
    sevs = sev.SEV_POLICY_SEV
    amd = peer.amd_certificates
    for bad, status in (
        (b"", psp.SEV_RET_INVALID_CERTIFICATE),
        (amd[:-1], psp.SEV_RET_INVALID_CERTIFICATE),
        (amd[832:] + amd[:832], psp.SEV_RET_INVALID_CERTIFICATE),
        (_at(amd, 700), psp.SEV_RET_BAD_SIGNATURE),
        (_at(amd, 30), psp.SEV_RET_BAD_SIGNATURE),
    ):
        assert verdict(identity, peer, 0, amd_certs=bad) == psp.SEV_RET_SUCCESS
        assert verdict(identity, peer, sevs, amd_certs=bad) == status


def test_another_root_is_no_sev_platform(identity: Identity, peer: Identity) -> None:
    """Somebody who makes a root of the same name, and everything below it, right."""
    root = certs.new_rsa_key()
    ark = certs.make_amd(root.public_key(), c.SEV_USAGE_ARK, certs.MODEL_ROOT_ID, root, certs.MODEL_ROOT_ID)
    ask = certs.make_amd(root.public_key(), c.SEV_USAGE_ASK, certs.MODEL_SIGNING_ID, root, certs.MODEL_ROOT_ID)
    cek = certs.unsigned(certs.parse_cert(peer.chain[2 * SIZE :]))
    certs.sign_cert_by_ask(cek, root)
    forged = {"plat_certs": peer.chain[: 2 * SIZE] + bytes(cek), "amd_certs": ask + ark}
    assert all(link.ok for link in Chain.of(peer.pdh_certificate, forged["plat_certs"], forged["amd_certs"]).links())
    assert verdict(identity, peer, sev.SEV_POLICY_SEV, **forged) == psp.SEV_RET_INVALID_CERTIFICATE
