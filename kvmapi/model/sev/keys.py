"""Where the platform's private keys rest, how they are used, and the root that vouches for the model's chips.

A key in use is an object of the cryptography library, on its heap, for the time of one operation; the library wipes it
after that. At rest a key is PKCS8 in the vault. An elliptic one is never encoded by the library, which leaves what it
encoded in freed memory: its number is drawn straight into its place in an encoding that stands there already.

The root (ARK and ASK, RSA as on AMD's first family) belongs to the process: all its platforms share it, and it is made
when the first one is. The ARK's private key is dropped as soon as it has signed; the ASK's stays in a vault of its own.
It is no guest's and no platform's key, and the only one that may leave a trace of its encoding behind.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import serialization

from kvmapi import certificates as certs
from kvmapi.abi import cert as c
from kvmapi.abi import psp
from kvmapi.model.sev.status import FirmwareError
from kvmapi.model.sev.vault import Vault
from kvmapi.wiping import wipe

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    from kvmapi.model.sev.store import Record
    from kvmapi.model.sev.vault import Secret

CERTIFICATES = ("PDH", "PEK", "OCA", "CEK", "ASK", "ARK")
KEYS = ("PDH", "PEK", "CEK")
"""Private keys that every platform has; the OCA's is there only while the platform owns itself."""
_CHIP = b"CHIP"
ID_SIZE = 64


_P384_SIZE = 48
_DRAWS = 4  # one in 2^190 is a number too large
_PKCS8 = bytes.fromhex("304e020100301006072a8648ce3d020106052b81040022043730350201010430")
"""A P-384 key in PKCS8 up to its number, without the public key, which the library computes."""


def draw(vault: Vault) -> Secret:
    """A new P-384 key at rest. RESOURCE_LIMIT when the vault is full."""
    secret = vault.hold(len(_PKCS8) + _P384_SIZE)
    try:
        for _ in range(_DRAWS):
            secret.fill_random()
            with vault.opened():
                secret.view[: len(_PKCS8)] = _PKCS8
            with contextlib.suppress(ValueError), in_use(vault, secret):  # a number that is not below the curve's order
                return secret
        raise FirmwareError(psp.SEV_RET_HWSEV_RET_PLATFORM)
    except BaseException:
        secret.release()
        raise


def keep(vault: Vault, private: RSAPrivateKey) -> Secret:
    """A key of the library's own making, at rest. RESOURCE_LIMIT when the vault is full."""
    encoded = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        secret = vault.hold(len(encoded))
        secret.set(encoded)
        return secret
    finally:
        wipe(encoded)


@contextlib.contextmanager
def in_use(vault: Vault, secret: Secret) -> Iterator[Any]:
    """The private key, loaded for the time of the context."""
    with vault.opened():
        private = serialization.load_der_private_key(secret.view, None, unsafe_skip_rsa_key_validation=True)  # ours, checked when made
    yield private


class KeyState:
    """One consistent set of keys and certificates; replaced as a whole, never changed after it took its place."""

    __slots__ = ("certificates", "chip_id", "keys")

    def __init__(self, chip_id: bytes, keys: dict[str, Secret], certificates: dict[str, bytes]) -> None:
        self.chip_id = chip_id
        self.keys = keys
        self.certificates = certificates

    def __repr__(self) -> str:
        return f"KeyState({', '.join(self.keys)}: never shown)"

    def copy(self) -> KeyState:
        """A draft that shares the keys."""
        return KeyState(self.chip_id, dict(self.keys), dict(self.certificates))

    def release(self, but: KeyState | None = None) -> None:
        """Wipe the keys, without those that `but` has too."""
        kept = set() if but is None else {id(key) for key in but.keys.values()}
        for key in self.keys.values():
            if id(key) not in kept:
                key.release()

    # ---- in a store
    def parts(self) -> dict[bytes, bytes | memoryview]:
        """For `Store.save`; the vault must be open meanwhile."""
        parts: dict[bytes, bytes | memoryview] = {_CHIP: self.chip_id}
        parts.update({f"{name}C".encode(): self.certificates[name] for name in CERTIFICATES})
        parts.update({f"{name}K".encode(): secret.view for name, secret in self.keys.items()})
        return parts

    @classmethod
    def of(cls, record: Record, vault: Vault) -> KeyState:
        """From a store. ValueError when parts are missing, or when keys and certificates do not belong together."""
        state = cls(b"", {}, {})
        try:
            state._take(record, vault)
        except KeyError as missing:
            state.release()
            raise ValueError(f"there is no part {missing}") from None
        except BaseException:
            state.release()
            raise
        return state

    def _take(self, record: Record, vault: Vault) -> None:
        self.chip_id = bytes(record.parts[_CHIP])
        if len(self.chip_id) != ID_SIZE:
            raise ValueError("the chip's id has another length")
        for name in CERTIFICATES:
            self.certificates[name] = bytes(record.parts[f"{name}C".encode()])
        for name in (*KEYS, *(("OCA",) if b"OCAK" in record.parts else ())):
            part = record.parts[f"{name}K".encode()]
            self.keys[name] = vault.hold(len(part))
            self.keys[name].set(part)
            with in_use(vault, self.keys[name]) as private:
                public = certs.cert_key(certs.parse_cert(self.certificates[name]))
                if private.public_key().public_numbers() != public.public_numbers():
                    raise ValueError(f"{name}'s key and certificate do not belong together")


class Root:
    """ARK and ASK of this process: `ark` and `ask` are their certificates."""

    _of_this_process: Root | None = None
    _making = threading.Lock()

    def __init__(self) -> None:
        root, signer = certs.new_rsa_key(), certs.new_rsa_key()
        self.ark = certs.make_amd(root.public_key(), c.SEV_USAGE_ARK, certs.MODEL_ROOT_ID, root, certs.MODEL_ROOT_ID)
        self.ask = certs.make_amd(signer.public_key(), c.SEV_USAGE_ASK, certs.MODEL_SIGNING_ID, root, certs.MODEL_ROOT_ID)
        self._vault = Vault()
        self._key = keep(self._vault, signer)

    @classmethod
    def of_this_process(cls) -> Root:
        """The one, made now if it is the first time (about 0.1 s)."""
        with cls._making:
            if cls._of_this_process is None:
                cls._of_this_process = cls()
            return cls._of_this_process

    @classmethod
    def forked(cls) -> None:
        """A child's first platform makes a root of its own: this one's key stayed with the parent."""
        cls._of_this_process, cls._making = None, threading.Lock()

    def sign(self, certificate: c.sev_cert) -> None:
        """Put the ASK's signature into a chip's certificate."""
        with in_use(self._vault, self._key) as private:
            certs.sign_cert_by_ask(certificate, private)


os.register_at_fork(after_in_child=Root.forked)
