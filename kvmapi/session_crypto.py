"""The cryptography of an SEV session, both sides: the guest owner wraps keys, the firmware unwraps them.

    Z      = ECDH P-384 (48 bytes, the X coordinate)
    master = KDF(Z, "sev-master-secret", nonce)     KEK = KDF(master, "sev-kek")     KIK = KDF(master, "sev-kik")
    wrap_tk = AES-128-CTR(KEK, wrap_iv, TEK | TIK)
    wrap_mac = HMAC(KIK, wrap_tk)                   policy_mac = HMAC(TIK, policy)

KDF is NIST SP 800-108 in counter mode with HMAC-SHA256; counter and length are little-endian, which the standard
leaves open. Keys and certificates are in `kvmapi.certificates`. Nothing of the objects above is imported, so the software
model's firmware uses this module too; the `cryptography` package is loaded on first use. Sources: AMD's SEV tool,
virtee's sev crate; their vectors are in the tests.
"""

from __future__ import annotations

import hmac

from kvmapi.abi import cert as c
from kvmapi.wiping import wipe

Key = bytes | bytearray | memoryview
KEY_SIZE = 16
_CONTEXT_SECRET = 0x01


class SessionError(ValueError):
    """A session or secret packet is malformed, or a MAC in it is wrong."""


def mac(key: Key, data: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    return hmac.digest(key, data, "sha256")


def kdf(key: Key, size: int, label: bytes, context: bytes = b"") -> bytes:
    """`size` bytes derived from `key`.

    >>> kdf(bytes(16), 16, b"sev-master-secret", bytes(16)).hex()
    'ab4d269fcc62bedb4511d56c386ce706'
    """
    tail = label + b"\0" + context + (size * 8).to_bytes(4, "little")
    result = bytearray()
    for i in range(1, -(-size // 32) + 1):
        block = mac(key, i.to_bytes(4, "little") + tail)
        result += block
        wipe(block)
    derived = bytes(memoryview(result)[:size])
    wipe(result)
    return derived


def wrapping_keys(z: Key, nonce: bytes) -> tuple[bytes, bytes]:
    """KEK and KIK from the shared secret; who is done with them wipes them."""
    master = kdf(z, KEY_SIZE, b"sev-master-secret", nonce)
    keys = kdf(master, KEY_SIZE, b"sev-kek"), kdf(master, KEY_SIZE, b"sev-kik")
    wipe(master)
    return keys


def aes_ctr(key: bytes, iv: bytes, data: Key) -> bytes:
    """AES-128 in counter mode, `iv` being the first counter block; the same call decrypts."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return encryptor.update(data) + encryptor.finalize()


# --- sessions ----------------------------------------------------------------------------------------------------


def wrap_session(z: bytes, tek: bytes, tik: bytes, policy: int, *, nonce: bytes, iv: bytes) -> bytes:
    """The 128-byte session blob for LAUNCH_START."""
    kek, kik = wrapping_keys(z, nonce)
    both = bytearray(tek + tik)
    wrapped = aes_ctr(kek, iv, both)
    blob = nonce + wrapped + iv + mac(kik, wrapped) + mac(tik, policy.to_bytes(4, "little"))
    for transient in (kek, kik, both):
        wipe(transient)
    return blob


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
