"""Session keys, secrets, certificates and the measurement, against the vectors that others published.

Vectors: virtee/sev (session and verify tests), AMD's sev-tool (calc_measurement); KEK and KIK were recomputed.
"""

from __future__ import annotations

import hashlib

import pytest

from kvmapi import certificates, measurement, session_crypto
from kvmapi.abi import cert
from kvmapi.session import OwnerSession
from kvmapi.session_crypto import SessionError

ZERO = bytes(16)
TIK = bytes.fromhex("66320db73158a35a255d051758e95ed4")
NONCE = bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554")
MEASURE = "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


def test_measure_vector() -> None:
    got = measurement.expected_measure(TIK, measurement.LaunchDigest().digest(), NONCE, policy=0, api_major=0, api_minor=0x12, build=0x0F)
    assert got.hex() == MEASURE


def test_old_firmware_leaves_the_version_out() -> None:
    digest = hashlib.sha256(b"").digest()
    old = [measurement.expected_measure(TIK, digest, NONCE, policy=1, api_major=0, api_minor=16, build=b) for b in (1, 2)]
    new = [measurement.expected_measure(TIK, digest, NONCE, policy=1, api_major=0, api_minor=17, build=b) for b in (1, 2)]
    assert old[0] == old[1] and new[0] != new[1] and old[0] not in new


def test_digest_depends_on_bytes_and_order_only() -> None:
    page, vmsa = b"\xf4" * 4096, bytes(4096)
    whole = measurement.LaunchDigest().update_data(page).update_vmsa(vmsa)
    parts = measurement.LaunchDigest().update_data(page[:16]).update_data(page[16:]).update_vmsa(memoryview(vmsa))
    assert whole.hexdigest() == parts.hexdigest() == hashlib.sha256(page + vmsa).hexdigest()
    assert measurement.LaunchDigest().update_vmsa(vmsa).update_data(page).digest() != whole.digest()
    # sev-snp-measure 0.0.13 for a plain SEV guest of one 4 KiB image
    assert measurement.LaunchDigest().update_data(page).hexdigest() == "c463e97030c51c30b895d549344c4eab69b204b7d8580516ac1d77ad55c9dd6d"
    copy = whole.copy()
    whole.update_data(page)
    assert copy.digest() == parts.digest() != whole.digest()


def test_digest_refuses_what_the_firmware_would() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        measurement.LaunchDigest().update_data(bytes(17))
    with pytest.raises(ValueError, match="4096"):
        measurement.LaunchDigest().update_vmsa(bytes(16))


def test_key_derivation_vectors() -> None:
    master = session_crypto.kdf(ZERO, 16, b"sev-master-secret", ZERO)
    assert master.hex() == "ab4d269fcc62bedb4511d56c386ce706"
    kek, kik = session_crypto.wrapping_keys(ZERO, ZERO)
    assert kek.hex() == "b6abfbfb75ea1ea74ed8750b8afdb973"
    assert kik.hex() == "53b524bf5669a363f365c864acba8572"
    assert len(session_crypto.kdf(ZERO, 70, b"x")) == 70


def test_session_vector() -> None:
    blob = cert.sev_session.from_buffer_copy(session_crypto.wrap_session(ZERO, ZERO, ZERO, 0, nonce=ZERO, iv=ZERO))
    assert bytes(blob.wrap_tk).hex() == "2137bc7f9bb8bd7c3e55a576a15d3454b3856b8ba27afadf46dcfee9f02c02c4"
    assert bytes(blob.wrap_mac).hex() == "3176c0752738bd9d5e86689534020f528c088f16238826b000b327dee6aeed7d"
    assert bytes(blob.policy_mac).hex() == "aa7855e13839dd767cd5da7c1ff5036540c9264b7a803029315e55375287b4af"


def test_session_unwraps_and_every_tampering_shows() -> None:
    tek, tik, z = bytes(range(16)), bytes(range(16, 32)), bytes(48)
    blob = session_crypto.wrap_session(z, tek, tik, 5, nonce=b"n" * 16, iv=b"i" * 16)
    assert session_crypto.unwrap_session(blob, z, 5) == (tek, tik)
    with pytest.raises(SessionError, match="policy"):
        session_crypto.unwrap_session(blob, z, 4)
    with pytest.raises(SessionError, match="platform key"):
        session_crypto.unwrap_session(blob, bytes(47) + b"\1", 5)
    with pytest.raises(SessionError, match="128 bytes"):
        session_crypto.unwrap_session(blob[:-1], z, 5)
    for at in (0, 16, 47, 48, 64, 96, 127):  # wrap_iv (48) has no MAC of its own: it shows in TIK, and so in policy_mac
        bad = bytearray(blob)
        bad[at] ^= 1
        with pytest.raises(SessionError):
            session_crypto.unwrap_session(bytes(bad), z, 5)


@pytest.mark.parametrize("measure", [bytes.fromhex(MEASURE), None])
def test_secret_opens_and_every_tampering_shows(measure: bytes | None) -> None:
    tek, tik = bytes(range(16)), bytes(range(16, 32))
    header, trans = session_crypto.seal_secret(tek, tik, b"disk key" * 4, b"v" * 16, measure=measure)
    assert len(header) == 52 and b"disk key" not in trans
    assert session_crypto.open_secret(tek, tik, header, trans, guest_len=32, measure=measure) == b"disk key" * 4
    for bad_header, bad_trans, length in (
        (header[:-1] + b"\0", trans, 32),
        (b"\1" + header[1:], trans, 32),
        (header, trans[:-1] + b"\0", 32),
        (header, trans, 16),
    ):
        with pytest.raises(SessionError, match="MAC"):
            session_crypto.open_secret(tek, tik, bad_header, bad_trans, guest_len=length, measure=measure)
    with pytest.raises(SessionError, match="MAC"):
        session_crypto.open_secret(tek, tik, header, trans, guest_len=32, measure=bytes(32))


def test_owner_and_firmware_meet() -> None:
    """The firmware's half of OwnerSession.create: unwrap with the PDH private key, measure, open a secret."""
    pdh_key = certificates.new_key()
    pdh = certificates.make_cert(pdh_key.public_key(), cert.SEV_USAGE_PDH, cert.SEV_ALGO_ECDH_SHA256, 1, 55)
    owner = OwnerSession.create(bytes(pdh), policy=4)
    assert (len(owner.dh_cert), len(owner.session)) == (2084, 128)

    z = certificates.shared_secret(pdh_key, certificates.cert_key(certificates.parse_cert(owner.dh_cert)))
    tek, tik = session_crypto.unwrap_session(owner.session, z, 4)
    assert (tek, tik) == (owner.tek, owner.tik)

    digest, version = bytes(32), {"api_major": 1, "api_minor": 55, "build": 7}
    measure = measurement.expected_measure(tik, digest, NONCE, policy=4, **version)
    assert owner.verify(measure, digest, NONCE, **version)
    assert not owner.verify(measure, digest, ZERO, **version)
    header, trans = owner.seal_secret(b"0123456789abcdef", measure)
    opened = session_crypto.open_secret(tek, tik, header, trans, guest_len=16, measure=measure)
    assert opened == b"0123456789abcdef"


def test_repr_hides_keys() -> None:
    owner = OwnerSession(1, b"cert", b"session", b"TEKTEKTEKTEKTEKT", b"TIKTIKTIKTIKTIKT")
    assert repr(owner) == "OwnerSession(policy=1)"
