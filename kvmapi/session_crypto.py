"""The cryptography of an SEV session, both sides: the guest owner wraps keys, the firmware unwraps them.

    Z      = ECDH P-384 (48 bytes, the X coordinate)
    master = KDF(Z, "sev-master-secret", nonce)     KEK = KDF(master, "sev-kek")     KIK = KDF(master, "sev-kik")
    wrap_tk = AES-128-CTR(KEK, wrap_iv, TEK | TIK)
    wrap_mac = HMAC(KIK, wrap_tk)                   policy_mac = HMAC(TIK, policy)

KDF is NIST SP 800-108 in counter mode with HMAC-SHA256; counter and length are little-endian, which the standard
leaves open. This module imports only `kvmapi.abi`, so the software model's firmware uses it too; the `cryptography`
package is loaded on first use. Sources: AMD's SEV tool, virtee's sev crate; their vectors are in the tests.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from kvmapi.abi import cert as c

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

KEY_SIZE = 16
_COORDINATE = 48
_FIELD = 72
_CONTEXT_SECRET = 0x01


class SessionError(ValueError):
    """A certificate, session or secret packet is malformed, or a MAC in it is wrong."""


def mac(key: bytes, data: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    return hmac.digest(key, data, "sha256")


def kdf(key: bytes, size: int, label: bytes, context: bytes = b"") -> bytes:
    """`size` bytes derived from `key`.

    >>> kdf(bytes(16), 16, b"sev-master-secret", bytes(16)).hex()
    'ab4d269fcc62bedb4511d56c386ce706'
    """
    tail = label + b"\0" + context + (size * 8).to_bytes(4, "little")
    blocks = -(-size // 32)
    return b"".join(mac(key, i.to_bytes(4, "little") + tail) for i in range(1, blocks + 1))[:size]


def wrapping_keys(z: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """KEK and KIK from the shared secret."""
    master = kdf(z, KEY_SIZE, b"sev-master-secret", nonce)
    return kdf(master, KEY_SIZE, b"sev-kek"), kdf(master, KEY_SIZE, b"sev-kik")


def aes_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    """AES-128 in counter mode, `iv` being the first counter block; the same call decrypts."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return encryptor.update(data) + encryptor.finalize()


# --- sessions ----------------------------------------------------------------------------------------------------


def wrap_session(z: bytes, tek: bytes, tik: bytes, policy: int, *, nonce: bytes, iv: bytes) -> bytes:
    """The 128-byte session blob for LAUNCH_START."""
    kek, kik = wrapping_keys(z, nonce)
    wrapped = aes_ctr(kek, iv, tek + tik)
    return nonce + wrapped + iv + mac(kik, wrapped) + mac(tik, policy.to_bytes(4, "little"))


def unwrap_session(session: bytes, z: bytes, policy: int) -> tuple[bytes, bytes]:
    """TEK and TIK from a session blob. Raises `SessionError` if a MAC is wrong: other keys, or another policy."""
    if len(session) != c.SEV_SESSION_SIZE:
        raise SessionError(f"a session has {c.SEV_SESSION_SIZE} bytes, not {len(session)}")
    blob = c.sev_session.from_buffer_copy(session)
    wrapped = bytes(blob.wrap_tk)
    kek, kik = wrapping_keys(z, bytes(blob.nonce))
    if not hmac.compare_digest(mac(kik, wrapped), bytes(blob.wrap_mac)):
        raise SessionError("the session's wrap MAC is wrong: it was made for another platform key")
    keys = aes_ctr(kek, bytes(blob.wrap_iv), wrapped)
    tek, tik = keys[:KEY_SIZE], keys[KEY_SIZE:]
    if not hmac.compare_digest(mac(tik, policy.to_bytes(4, "little")), bytes(blob.policy_mac)):
        raise SessionError(f"the session's policy MAC is wrong: it was made for another policy than {policy:#x}")
    return tek, tik


# --- secrets -----------------------------------------------------------------------------------------------------


def _secret_mac(tik: bytes, header: bytes, guest_len: int, trans: bytes, measure: bytes | None) -> bytes:
    lengths = guest_len.to_bytes(4, "little") + len(trans).to_bytes(4, "little")
    return mac(tik, bytes((_CONTEXT_SECRET,)) + header[:20] + lengths + trans + (measure or b""))


def seal_secret(tek: bytes, tik: bytes, plaintext: bytes, iv: bytes, *, measure: bytes | None, flags: int = 0) -> tuple[bytes, bytes]:
    """Header (52 bytes) and ciphertext for LAUNCH_SECRET. `measure` is None for firmware before API 0.17."""
    trans = aes_ctr(tek, iv, plaintext)
    head = flags.to_bytes(4, "little") + iv
    return head + _secret_mac(tik, head, len(plaintext), trans, measure), trans


def open_secret(tek: bytes, tik: bytes, header: bytes, trans: bytes, *, guest_len: int, measure: bytes | None) -> bytes:
    """The plaintext of a secret packet. Raises `SessionError` if its MAC is wrong."""
    if len(header) != c.SEV_SECRET_HEADER_SIZE:
        raise SessionError(f"a secret header has {c.SEV_SECRET_HEADER_SIZE} bytes, not {len(header)}")
    if not hmac.compare_digest(_secret_mac(tik, header, guest_len, trans, measure), header[20:]):
        raise SessionError("the secret packet's MAC is wrong")
    return aes_ctr(tek, header[4:20], trans)


# --- keys and certificates -----------------------------------------------------------------------------------------


def new_key() -> EllipticCurvePrivateKey:
    """A fresh P-384 private key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def make_cert(key: EllipticCurvePublicKey, usage: int, algo: int, api_major: int = 0, api_minor: int = 0) -> c.sev_cert:
    """An unsigned SEV certificate for a P-384 public key; both signature slots say "invalid"."""
    numbers = key.public_numbers()
    result = c.sev_cert(version=c.SEV_CERT_VERSION, api_major=api_major, api_minor=api_minor, pubkey_usage=usage, pubkey_algo=algo)
    result.pubkey.curve = c.SEV_CURVE_P384
    result.pubkey.qx[:] = numbers.x.to_bytes(_FIELD, "little")
    result.pubkey.qy[:] = numbers.y.to_bytes(_FIELD, "little")
    result.sig1.usage = result.sig2.usage = c.SEV_USAGE_INVALID
    return result


def parse_cert(data: bytes) -> c.sev_cert:
    """A certificate from its 2084 bytes. Raises `SessionError` if the length or the version is another."""
    if len(data) != c.SEV_CERT_SIZE:
        raise SessionError(f"an SEV certificate has {c.SEV_CERT_SIZE} bytes, not {len(data)}")
    result = c.sev_cert.from_buffer_copy(data)
    if result.version != c.SEV_CERT_VERSION:
        raise SessionError(f"certificate version {result.version}, only {c.SEV_CERT_VERSION} exists")
    return result


def cert_key(certificate: c.sev_cert) -> EllipticCurvePublicKey:
    """The P-384 public key in a certificate. Raises `SessionError` if it is another curve, or no point on it."""
    from cryptography.hazmat.primitives.asymmetric import ec

    if certificate.pubkey.curve != c.SEV_CURVE_P384:
        raise SessionError(f"the key is on curve {certificate.pubkey.curve}, not on P-384")
    x = int.from_bytes(bytes(certificate.pubkey.qx), "little")
    y = int.from_bytes(bytes(certificate.pubkey.qy), "little")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError as reason:
        raise SessionError(f"the certificate's key is not a point on P-384: {reason}") from None


def shared_secret(private: EllipticCurvePrivateKey, peer: EllipticCurvePublicKey) -> bytes:
    """Z, 48 bytes big-endian, as OpenSSL derives it."""
    from cryptography.hazmat.primitives.asymmetric import ec

    z = private.exchange(ec.ECDH(), peer)
    if len(z) != _COORDINATE:
        raise SessionError(f"shared secret of {len(z)} bytes, not {_COORDINATE}: another curve")
    return z


def sign(private: EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA with SHA-256 in the firmware's form: r and s, 72 bytes each, little-endian (144 bytes)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    r, s = utils.decode_dss_signature(private.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(_FIELD, "little") + s.to_bytes(_FIELD, "little")


def verify(public: EllipticCurvePublicKey, data: bytes, signature: bytes) -> bool:
    """Whether `signature` (its first 144 bytes) is that key's for `data`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    r = int.from_bytes(signature[:_FIELD], "little")
    s = int.from_bytes(signature[_FIELD : 2 * _FIELD], "little")
    try:
        public.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def sign_cert(certificate: c.sev_cert, private: EllipticCurvePrivateKey, usage: int) -> None:
    """Put a signature (ECDSA with SHA-256) by the key of kind `usage` into the first free slot of a certificate."""
    for slot in (certificate.sig1, certificate.sig2):
        if slot.usage == c.SEV_USAGE_INVALID:
            signature = sign(private, bytes(certificate)[: c.SEV_CERT_BODY_SIZE])
            slot.usage, slot.algo = usage, c.SEV_ALGO_ECDSA_SHA256
            slot.sig[: len(signature)] = signature
            return
    raise SessionError("both signature slots of the certificate are taken")


def cert_signed_by(certificate: c.sev_cert, signer: c.sev_cert) -> bool:
    """Whether one of the certificate's signatures is by the signer's key (ECDSA with SHA-256)."""
    body = bytes(certificate)[: c.SEV_CERT_BODY_SIZE]
    key = cert_key(signer)
    return any(slot.usage == signer.pubkey_usage and verify(key, body, bytes(slot.sig)) for slot in (certificate.sig1, certificate.sig2))
