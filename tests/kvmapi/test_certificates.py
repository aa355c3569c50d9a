"""Keys, certificates and chains: against a real chip's, against OpenSSL's command line, and against whatever is malformed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapi import certificates as certs
from kvmapi.abi import cert as c
from kvmapi.cert_chain import MALFORMED, MISSING, SIGNATURE, Chain
from kvmapi.certificates import CertificateError
from tests.kvmapi import naples
from tests.kvmapi.openssl import PSS, Judge, ecdsa, p384, rsa2048

ORDER = ("pdh", "pek", "oca", "cek", "ask", "ark")


def real() -> dict[str, bytes]:
    return dict(zip(ORDER, naples.chain(), strict=True))


def faults(chain: Chain) -> dict[str, str]:
    return {str(link): link.fault for link in chain.links() if link.fault}


# --- a real chip -----------------------------------------------------------------------------------------------------


def test_a_real_chips_chain_holds() -> None:
    chain = Chain(**real())
    assert faults(chain) == {}
    assert [str(link) for link in chain.links()] == [
        "PDH <- PEK", "PEK <- OCA", "OCA <- OCA", "PEK <- CEK", "CEK <- ASK", "ASK <- ARK", "ARK <- ARK",
    ]  # fmt: skip
    assert certs.AMD_FAMILIES[chain.root] == "Naples"


@pytest.mark.parametrize(
    ("changed", "at", "broken"),
    [
        ("pdh", 200, {"PDH <- PEK": SIGNATURE}),  # reserved, and signed
        ("pdh", 100, {"PDH <- PEK": MALFORMED}),  # another qy: no point of the curve
        ("pdh", 1044 + 8 + 144, {}),  # behind r and s
        ("pek", 1044 + 8, {"PEK <- OCA": SIGNATURE}),
        ("pek", 1044 + 520 + 8, {"PEK <- CEK": SIGNATURE}),
        ("oca", 1044 + 8, {"OCA <- OCA": SIGNATURE}),
        ("cek", 1044 + 8, {"CEK <- ASK": SIGNATURE}),
        ("cek", 1044 + 8 + 300, {}),  # behind a signature of 256 bytes
        ("ask", 64 + 512 + 5, {"ASK <- ARK": SIGNATURE}),
        ("ask", 30, {"ASK <- ARK": SIGNATURE}),  # the id of its signer
        ("ark", 64 + 512 + 5, {"ARK <- ARK": SIGNATURE}),
    ],
)
def test_each_link_is_looked_at(changed: str, at: int, broken: dict[str, str]) -> None:
    parts = real()
    data = bytearray(parts[changed])
    data[at] ^= 1
    assert faults(Chain(**{**parts, changed: bytes(data)})) == broken


def test_what_is_missing_or_malformed_is_named() -> None:
    parts = real()
    chain = Chain(**{**parts, "ask": b"", "ark": b""})
    assert faults(chain) == {"CEK <- ASK": MISSING, "ASK <- ARK": MISSING, "ARK <- ARK": MISSING}
    assert chain.root == b""
    chain = Chain(**{**parts, "pek": parts["pek"][:-1]})
    assert faults(chain) == {"PDH <- PEK": MALFORMED, "PEK <- OCA": MALFORMED, "PEK <- CEK": MALFORMED}
    assert "2084 bytes" in chain.links()[0].words
    chain = Chain(**{**parts, "oca": parts["cek"]})
    assert "for CEK, not OCA" in chain.links()[1].words


def test_a_chips_own_export_lacks_amds_signature() -> None:
    """What PDH_CERT_EXPORT gives on hardware: the CEK's signature slots are empty."""
    parts = real()
    bare = bytes(certs.unsigned(certs.parse_cert(parts["cek"])))
    assert faults(Chain(**{**parts, "cek": bare})) == {"CEK <- ASK": SIGNATURE}


def test_the_published_root_without_signature() -> None:
    """AMD's file for Naples ends in front of the ARK's own signature."""
    parts = real()
    short = parts["ark"][: 64 + 512]
    ask, ark = certs.split_amd(parts["ask"] + short)
    assert (bytes(ask), bytes(ark), ark.signature) == (parts["ask"], short, b"")
    chain = Chain(**{**parts, "ark": short})
    assert faults(chain) == {}
    assert "without its own signature" in chain.links()[-1].words


def test_a_chain_from_what_the_ioctl_gives() -> None:
    parts = real()
    platform = parts["pek"] + parts["oca"] + parts["cek"]
    assert Chain.of(parts["pdh"], platform, parts["ask"] + parts["ark"]) == Chain(**parts)
    assert Chain.of(parts["pdh"], platform).ask == b""
    assert faults(Chain.of(parts["pdh"], platform + b"x"))["PEK <- CEK"] == MALFORMED


# --- our own signatures, judged by OpenSSL ---------------------------------------------------------------------------


@pytest.fixture
def openssl(tmp_path: Path) -> Judge:
    return Judge(tmp_path)


def test_openssl_accepts_a_real_chips_signatures(openssl: Judge) -> None:
    """The judge itself: the layouts above are right for somebody else's certificates."""
    parts = real()
    assert openssl(p384(parts["pek"]), parts["pdh"][:1044], ecdsa(parts["pdh"][1052:]))
    assert openssl(rsa2048(parts["ask"]), parts["cek"][:1044], parts["cek"][1052 : 1052 + 256][::-1], *PSS)
    assert not openssl(p384(parts["oca"]), parts["pdh"][:1044], ecdsa(parts["pdh"][1052:]))


def test_openssl_accepts_ours(openssl: Judge) -> None:
    key, ask = certs.new_key(), certs.new_rsa_key()
    made = certs.make_cert(certs.new_key().public_key(), c.SEV_USAGE_CEK, c.SEV_ALGO_ECDSA_SHA256, 1, 55)
    signer = bytes(certs.make_cert(key.public_key(), c.SEV_USAGE_OCA, c.SEV_ALGO_ECDSA_SHA256))
    certs.sign_cert(made, key, c.SEV_USAGE_OCA)
    certs.sign_cert_by_ask(made, ask)
    data = bytes(made)
    assert openssl(p384(signer), data[:1044], ecdsa(data[1052:]))
    amd = certs.make_amd(ask.public_key(), c.SEV_USAGE_ASK, b"i" * 16, ask, b"j" * 16)
    assert len(amd) == 832 and amd[4:20] == b"i" * 16 and amd[20:36] == b"j" * 16
    assert openssl(rsa2048(amd), data[:1044], data[1572 : 1572 + 256][::-1], *PSS)
    assert openssl(rsa2048(amd), amd[:576], amd[576:][::-1], *PSS)
    assert not openssl(rsa2048(amd), amd[:575], amd[576:][::-1], *PSS)


# --- making and parsing ----------------------------------------------------------------------------------------------


def test_certificates_round_trip() -> None:
    pek_key, pdh_key = certs.new_key(), certs.new_key()
    pek = certs.make_cert(pek_key.public_key(), c.SEV_USAGE_PEK, c.SEV_ALGO_ECDSA_SHA256)
    pdh = certs.make_cert(pdh_key.public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256)
    certs.sign_cert(pdh, pek_key, c.SEV_USAGE_PEK)
    again = certs.parse_cert(bytes(pdh), c.SEV_USAGE_PDH)
    assert certs.cert_signed_by(again, pek)
    assert certs.cert_key(again).public_numbers() == pdh_key.public_key().public_numbers()
    again.api_minor ^= 1
    assert not certs.cert_signed_by(again, pek)
    certs.sign_cert(pdh, pek_key, c.SEV_USAGE_PEK)
    with pytest.raises(CertificateError, match="slots"):
        certs.sign_cert(pdh, pek_key, c.SEV_USAGE_PEK)


def test_a_signature_counts_only_as_what_it_says_it_is() -> None:
    key = certs.new_key()
    oca = certs.make_cert(key.public_key(), c.SEV_USAGE_OCA, c.SEV_ALGO_ECDSA_SHA256)
    made = certs.make_cert(certs.new_key().public_key(), c.SEV_USAGE_PEK, c.SEV_ALGO_ECDSA_SHA256)
    certs.sign_cert(made, key, c.SEV_USAGE_OCA)
    assert certs.cert_signed_by(made, oca)
    made.sig1.usage = c.SEV_USAGE_CEK
    assert not certs.cert_signed_by(made, oca), "another kind of signer"
    made.sig1.usage, made.sig1.algo = c.SEV_USAGE_OCA, c.SEV_ALGO_ECDSA_SHA384
    assert not certs.cert_signed_by(made, oca), "another hash"
    made.sig1.algo, oca.pubkey_algo = c.SEV_ALGO_ECDH_SHA256, c.SEV_ALGO_ECDH_SHA256
    assert not certs.cert_signed_by(made, oca), "a key that does not sign"


def test_amds_signatures_count_only_as_what_they_say_they_are() -> None:
    parts = real()
    ask = certs.parse_amd(parts["ask"])
    for change in ({"usage": c.SEV_USAGE_ARK}, {"algo": c.SEV_ALGO_RSA_SHA384}, {"algo": c.SEV_ALGO_ECDSA_SHA256}):
        cek = certs.parse_cert(parts["cek"])
        assert certs.cert_signed_by_ask(cek, ask)
        for name, value in change.items():
            setattr(cek.sig1, name, value)
        assert not certs.cert_signed_by_ask(cek, ask)


def test_a_certificate_names_its_signer() -> None:
    """A right signature below a wrong name is none: the name is what a reader compares."""
    root, signer = certs.new_rsa_key(), certs.new_rsa_key()
    ark = certs.parse_amd(certs.make_amd(root.public_key(), c.SEV_USAGE_ARK, b"r" * 16, root, b"r" * 16))
    right, wrong = (
        certs.parse_amd(certs.make_amd(signer.public_key(), c.SEV_USAGE_ASK, b"s" * 16, root, by)) for by in (b"r" * 16, b"x" * 16)
    )
    assert ark.verify(wrong.body, wrong.signature)
    assert right.signed_by(ark)
    assert not wrong.signed_by(ark)


def test_a_request_has_no_signatures() -> None:
    pek = certs.parse_cert(real()["pek"])
    request = certs.unsigned(pek)
    assert bytes(request)[:1044] == bytes(pek)[:1044]
    empty = (0x1000).to_bytes(4, "little") + bytes(516)
    assert bytes(request)[1044:] == 2 * empty


@pytest.mark.parametrize(
    ("usage", "change", "words"),
    [
        (None, lambda d: d[:-1], "2084 bytes"),
        (None, lambda d: d + b"\0", "2084 bytes"),
        (None, lambda d: b"\2" + d[1:], "version 2"),
        (c.SEV_USAGE_PEK, lambda d: d, "for PDH, not PEK"),
        (c.SEV_USAGE_PDH, lambda d: d[:12] + b"\2" + d[13:], "algorithm 0x2"),
        (c.SEV_USAGE_PDH, lambda d: d[:16] + b"\1" + d[17:], "P-384"),
        (c.SEV_USAGE_PDH, lambda d: d[:20] + bytes((d[20] ^ 1,)) + d[21:], "not a point"),
        (c.SEV_USAGE_PDH, lambda d: d[:20] + bytes(144) + d[164:], "not a point"),
    ],
)
def test_malformed_certificates_are_refused(usage: int | None, change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        certs.parse_cert(change(real()["pdh"]), usage)


def _head(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: b"", "head of 64 bytes"),
        (lambda d: d[:63], "head of 64 bytes"),
        (lambda d: _head(d, 0, 2), "version 2"),
        (lambda d: _head(d, 60, 1024), "2048 or 4096"),
        (lambda d: _head(d, 56, 4096), "2048 or 4096"),
        (lambda d: _head(_head(d, 56, 1 << 31), 60, 1 << 31), "2048 or 4096"),
        (lambda d: d[:-1], "ends after 831"),
        (lambda d: d[:577], "ends after 577"),
        (lambda d: d + b"x", "1 bytes follow"),
        (lambda d: d[:64] + bytes(256) + d[320:], "no usable RSA key"),
        (lambda d: d[:64] + b"\xff" * 256 + d[320:], "no usable RSA key"),
        (lambda d: d[:320] + bytes(256) + d[576:], "no usable RSA key"),
        (lambda d: _head(d, 36, 0x13), "for ASK, not ARK"),
    ],
)
def test_malformed_amd_certificates_are_refused(change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        certs.parse_amd(change(real()["ark"]), c.SEV_USAGE_ARK)


@given(st.sampled_from(ORDER), st.lists(st.tuples(st.integers(0, 2083), st.integers(0, 255)), max_size=6), st.integers(0, 2100))
def test_nothing_makes_the_verifier_fall(name: str, changes: list[tuple[int, int]], length: int) -> None:
    """Whatever stands in a file: links with a verdict, never another exception."""
    parts = real()
    data = bytearray(parts[name])
    for at, value in changes:
        data[at % len(data)] = value
    chain = Chain(**{**parts, name: bytes(data[:length])})
    assert len(chain.links()) == 7
    assert all(link.words for link in chain.links() if not link.ok)
