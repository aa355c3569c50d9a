"""Keys and certificates of the SEV platform: what they hold, who signed them, whether a chain holds together.

    PDH <- PEK <- OCA            the owner's chain: OCA signs itself, or is its owner's
              \\- CEK <- ASK <- ARK      AMD's chain: the chip's key, AMD's signing key, AMD's root, which signs itself

PDH, PEK, OCA and CEK have SEV's own format (2084 bytes, P-384, ECDSA); ASK and ARK have AMD's (RSA, PSS padding). All
integers in them are little-endian, signatures too. A firmware exports its CEK without AMD's signature; the signed one
is kept by AMD's key server under the chip's id. `sevmm`'s model has nobody to ask, so its CEK comes signed, by a root
of its own that says so in its key id.

Nothing here trusts what it parses: whatever is malformed is a `CertificateError`, and a signature that cannot be checked
is no signature. This module imports only `kvmapi.abi`, so the model's firmware uses it too; `cryptography` is loaded on
first use. Sources: AMD's SEV tool and virtee's sev crate (facts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmapi.abi import cert as c

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

_COORDINATE = 48
_FIELD = 72
_AMD_HEAD = 64
_LARGEST_EXPONENT = 1 << 64  # OpenSSL's own limit for large moduli; AMD's keys have 65537
_RSA_ALGO = {2048: c.SEV_ALGO_RSA_SHA256, 4096: c.SEV_ALGO_RSA_SHA384}
_SHA384 = frozenset((c.SEV_ALGO_RSA_SHA384, c.SEV_ALGO_ECDSA_SHA384))
ECDSA_ALGOS = frozenset((c.SEV_ALGO_ECDSA_SHA256, c.SEV_ALGO_ECDSA_SHA384))
ECDH_ALGOS = frozenset((c.SEV_ALGO_ECDH_SHA256, c.SEV_ALGO_ECDH_SHA384))
USAGE_NAMES = {
    c.SEV_USAGE_ARK: "ARK", c.SEV_USAGE_ASK: "ASK", c.SEV_USAGE_OCA: "OCA", c.SEV_USAGE_PEK: "PEK", c.SEV_USAGE_PDH: "PDH",
    c.SEV_USAGE_CEK: "CEK", c.SEV_USAGE_INVALID: "nothing",
}  # fmt: skip


class CertificateError(ValueError):
    """A certificate is malformed: another length, version, usage or algorithm, or a key that is none."""


def usage_name(usage: int) -> str:
    """ARK, ASK, OCA, PEK, PDH, CEK, or the number."""
    return USAGE_NAMES.get(usage, f"usage {usage:#x}")


def _hash(algo: int) -> HashAlgorithm:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA384() if algo in _SHA384 else hashes.SHA256()


# --- keys --------------------------------------------------------------------------------------------------------


def new_key() -> EllipticCurvePrivateKey:
    """A fresh P-384 private key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def shared_secret(private: EllipticCurvePrivateKey, peer: EllipticCurvePublicKey) -> bytes:
    """Z, 48 bytes big-endian, as OpenSSL derives it."""
    from cryptography.hazmat.primitives.asymmetric import ec

    z = private.exchange(ec.ECDH(), peer)
    if len(z) != _COORDINATE:
        raise CertificateError(f"shared secret of {len(z)} bytes, not {_COORDINATE}: another curve")
    return z


def sign(private: EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA with SHA-256 in the firmware's form: r and s, 72 bytes each, little-endian (144 bytes)."""
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    r, s = utils.decode_dss_signature(private.sign(data, ec.ECDSA(_hash(c.SEV_ALGO_ECDSA_SHA256))))
    return r.to_bytes(_FIELD, "little") + s.to_bytes(_FIELD, "little")


def verify(public: EllipticCurvePublicKey, data: bytes, signature: bytes, algo: int = c.SEV_ALGO_ECDSA_SHA256) -> bool:
    """Whether `signature` (its first 144 bytes) is that key's for `data`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    r = int.from_bytes(signature[:_FIELD], "little")
    s = int.from_bytes(signature[_FIELD : 2 * _FIELD], "little")
    try:
        public.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(_hash(algo)))
    except (InvalidSignature, ValueError):
        return False
    return True


# --- certificates in SEV's format: PDH, PEK, OCA, CEK ----------------------------------------------------------------


def make_cert(key: EllipticCurvePublicKey, usage: int, algo: int, api_major: int = 0, api_minor: int = 0) -> c.sev_cert:
    """An unsigned SEV certificate for a P-384 public key; both signature slots say "invalid"."""
    numbers = key.public_numbers()
    result = c.sev_cert(version=c.SEV_CERT_VERSION, api_major=api_major, api_minor=api_minor, pubkey_usage=usage, pubkey_algo=algo)
    result.pubkey.curve = c.SEV_CURVE_P384
    result.pubkey.qx[:] = numbers.x.to_bytes(_FIELD, "little")
    result.pubkey.qy[:] = numbers.y.to_bytes(_FIELD, "little")
    result.sig1.usage = result.sig2.usage = c.SEV_USAGE_INVALID
    return result


def parse_cert(data: bytes, usage: int | None = None) -> c.sev_cert:
    """A certificate from its 2084 bytes.

    Raises `CertificateError` if the length or the version is another. With `usage`, the key must also be of that kind,
    with an algorithm that fits, and a point on P-384.
    """
    if len(data) != c.SEV_CERT_SIZE:
        raise CertificateError(f"an SEV certificate has {c.SEV_CERT_SIZE} bytes, not {len(data)}")
    result = c.sev_cert.from_buffer_copy(data)
    if result.version != c.SEV_CERT_VERSION:
        raise CertificateError(f"certificate version {result.version}, only {c.SEV_CERT_VERSION} exists")
    if usage is None:
        return result
    if result.pubkey_usage != usage:
        raise CertificateError(f"it certifies a key for {usage_name(result.pubkey_usage)}, not {usage_name(usage)}")
    if result.pubkey_algo not in (ECDH_ALGOS if usage == c.SEV_USAGE_PDH else ECDSA_ALGOS):
        raise CertificateError(f"algorithm {result.pubkey_algo:#x} does not fit a {usage_name(usage)}")
    cert_key(result)
    return result


def cert_key(certificate: c.sev_cert) -> EllipticCurvePublicKey:
    """The P-384 public key in a certificate. Raises `CertificateError` if it is another curve, or no point on it."""
    from cryptography.hazmat.primitives.asymmetric import ec

    if certificate.pubkey.curve != c.SEV_CURVE_P384:
        raise CertificateError(f"the key is on curve {certificate.pubkey.curve}, not on P-384")
    x = int.from_bytes(bytes(certificate.pubkey.qx), "little")
    y = int.from_bytes(bytes(certificate.pubkey.qy), "little")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError as reason:
        raise CertificateError(f"the certificate's key is not a point on P-384: {reason}") from None


def body(certificate: c.sev_cert) -> bytes:
    """What the signatures of a certificate cover (1044 bytes)."""
    return bytes(certificate)[: c.SEV_CERT_BODY_SIZE]


def unsigned(certificate: c.sev_cert) -> c.sev_cert:
    """A copy without signatures: the form of a certificate signing request."""
    copy = c.sev_cert.from_buffer_copy(body(certificate).ljust(c.SEV_CERT_SIZE, b"\0"))
    copy.sig1.usage = copy.sig2.usage = c.SEV_USAGE_INVALID
    return copy


def _free_slot(certificate: c.sev_cert) -> c.sev_cert_signature:
    slots: tuple[c.sev_cert_signature, ...] = (certificate.sig1, certificate.sig2)
    for slot in slots:
        if slot.usage == c.SEV_USAGE_INVALID:
            return slot
    raise CertificateError("both signature slots of the certificate are taken")


def sign_cert(certificate: c.sev_cert, private: EllipticCurvePrivateKey, usage: int) -> None:
    """Put a signature (ECDSA with SHA-256) by the key of kind `usage` into the first free slot of a certificate."""
    slot = _free_slot(certificate)
    signature = sign(private, body(certificate))
    slot.usage, slot.algo = usage, c.SEV_ALGO_ECDSA_SHA256
    slot.sig[: len(signature)] = signature


def sign_cert_by_ask(certificate: c.sev_cert, private: RSAPrivateKey) -> None:
    """Put the ASK's signature (RSA-PSS) into the first free slot of a chip's certificate."""
    slot = _free_slot(certificate)
    signature = _rsa_sign(private, body(certificate))
    slot.usage, slot.algo = c.SEV_USAGE_ASK, _RSA_ALGO[private.key_size]
    slot.sig[: len(signature)] = signature


def signature_by(certificate: c.sev_cert, signer: c.sev_cert) -> c.sev_cert_signature | None:
    """The certificate's signature by the signer's key, with the signer's own algorithm; None if it has none that is valid."""
    if signer.pubkey_algo not in ECDSA_ALGOS:
        return None
    key, data = cert_key(signer), body(certificate)
    slots: tuple[c.sev_cert_signature, ...] = (certificate.sig1, certificate.sig2)
    for slot in slots:
        expected = (signer.pubkey_usage, signer.pubkey_algo)
        if (slot.usage, slot.algo) == expected and verify(key, data, bytes(slot.sig), slot.algo):
            return slot
    return None


def cert_signed_by(certificate: c.sev_cert, signer: c.sev_cert) -> bool:
    """Whether one of the certificate's signatures is by the signer's key."""
    return signature_by(certificate, signer) is not None


def cert_signed_by_ask(certificate: c.sev_cert, ask: AmdCertificate) -> bool:
    """Whether one of the certificate's signatures is by AMD's signing key."""
    data = body(certificate)
    return any(
        slot.usage == ask.usage and slot.algo == ask.algo and ask.verify(data, bytes(slot.sig))
        for slot in (certificate.sig1, certificate.sig2)
    )


# --- certificates in AMD's format: ASK, ARK --------------------------------------------------------------------------

MODEL_ROOT_ID = b"SEVMM MODEL ROOT"
MODEL_SIGNING_ID = b"SEVMM MODEL SIGN"
AMD_FAMILIES = {
    bytes.fromhex("1bb987c359494606b174945601c9ea5b"): "Naples",
    bytes.fromhex("e6002122fb58419399d15fee7b131351"): "Rome",
    bytes.fromhex("94c38e4177d0479292a7ae671d083fb6"): "Milan",
    bytes.fromhex("9f9d4a8fe761456599f6946c4c010f3a"): "Genoa",
    bytes.fromhex("d05c3a8bde484904b49552422ceb3942"): "Turin",
}
"""Key ids of AMD's roots. An id proves nothing, anybody can write it: it tells which published root to compare with."""


@dataclass(frozen=True, slots=True)
class AmdCertificate:
    """An ASK or ARK. `signature` is as it stands in the certificate (little-endian), empty where the file ends before it.

    AMD publishes its Naples ARK cut off in front of the signature; nothing is lost, a root's own signature proves nothing.
    """

    key_id: bytes
    certifying_id: bytes
    usage: int
    bits: int
    exponent: int
    modulus: int = field(repr=False)
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def __bytes__(self) -> bytes:
        return self.body + self.signature

    @property
    def algo(self) -> int:
        """SEV_ALGO_RSA_SHA256 or _SHA384: the length of the key decides."""
        return _RSA_ALGO[self.bits]

    @property
    def key(self) -> RSAPublicKey:
        """The public key. Raises `CertificateError` if the numbers are none."""
        from cryptography.hazmat.primitives.asymmetric import rsa

        try:
            return rsa.RSAPublicNumbers(self.exponent, self.modulus).public_key()
        except ValueError as reason:
            raise CertificateError(f"the certificate's numbers are no RSA key: {reason}") from None

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` (little-endian, as much of it as the key is long) is this key's for `data`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import padding

        chosen = _hash(self.algo)
        scheme = padding.PSS(padding.MGF1(chosen), padding.PSS.AUTO)
        try:
            self.key.verify(signature[: self.bits // 8][::-1], data, scheme, chosen)
        except (InvalidSignature, ValueError):
            return False
        return True

    def signed_by(self, signer: AmdCertificate) -> bool:
        """Whether the certificate names `signer` as its signer and carries its signature."""
        return self.certifying_id == signer.key_id and signer.verify(self.body, self.signature)


def parse_amd(data: bytes, usage: int | None = None) -> AmdCertificate:
    """One certificate in AMD's format, of `usage` if that is given. Raises `CertificateError`."""
    found, rest = _take_amd(data)
    if rest:
        raise CertificateError(f"{len(rest)} bytes follow AMD's certificate")
    if usage is not None and found.usage != usage:
        raise CertificateError(f"it certifies a key for {usage_name(found.usage)}, not {usage_name(usage)}")
    return found


def split_amd(data: bytes) -> tuple[AmdCertificate, AmdCertificate]:
    """ASK and ARK from one file or buffer, ASK first, as AMD publishes them. Raises `CertificateError`."""
    ask, rest = _take_amd(data)
    parse_amd(bytes(ask), c.SEV_USAGE_ASK)
    return ask, parse_amd(rest, c.SEV_USAGE_ARK)


def _take_amd(data: bytes) -> tuple[AmdCertificate, bytes]:
    if len(data) < _AMD_HEAD:
        raise CertificateError(f"AMD's certificates have a head of {_AMD_HEAD} bytes; here are {len(data)}")
    head = c.amd_cert_head.from_buffer_copy(data)
    if head.version != c.AMD_CERT_VERSION:
        raise CertificateError(f"AMD certificate version {head.version}, only {c.AMD_CERT_VERSION} exists")
    bits = head.modulus_size
    if bits not in c.AMD_CERT_KEY_BITS or head.pub_exp_size != bits:
        raise CertificateError(f"key of {bits} bits and exponent of {head.pub_exp_size}: both must have 2048 or 4096")
    step = bits // 8
    end = _AMD_HEAD + 2 * step
    if len(data) != end and len(data) < end + step:
        raise CertificateError(f"AMD's certificate ends after {len(data)} bytes, it should have {end + step}")
    exponent = int.from_bytes(data[_AMD_HEAD : _AMD_HEAD + step], "little")
    modulus = int.from_bytes(data[_AMD_HEAD + step : end], "little")
    if not 3 <= exponent < _LARGEST_EXPONENT or modulus.bit_length() != bits:
        raise CertificateError("AMD's certificate holds no usable RSA key")
    found = AmdCertificate(
        bytes(head.key_id), bytes(head.certifying_id), head.key_usage, bits, exponent, modulus, data[:end], data[end : end + step]
    )
    return found, data[end + step :]


def new_rsa_key() -> RSAPrivateKey:
    """A fresh RSA key of 2048 bits, as AMD's first family has; about 50 ms."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def make_amd(key: RSAPublicKey, usage: int, key_id: bytes, signer: RSAPrivateKey, signer_id: bytes) -> bytes:
    """A signed certificate in AMD's format."""
    step = key.key_size // 8
    head = c.amd_cert_head(version=c.AMD_CERT_VERSION, key_usage=usage, pub_exp_size=key.key_size, modulus_size=key.key_size)
    head.key_id[:], head.certifying_id[:] = key_id, signer_id
    numbers = key.public_numbers()
    text = bytes(head) + numbers.e.to_bytes(step, "little") + numbers.n.to_bytes(step, "little")
    return text + _rsa_sign(signer, text)


def _rsa_sign(private: RSAPrivateKey, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import padding

    chosen = _hash(_RSA_ALGO[private.key_size])
    return private.sign(data, padding.PSS(padding.MGF1(chosen), chosen.digest_size), chosen)[::-1]
