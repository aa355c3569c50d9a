"""`OwnerSession`: the guest owner's side of a launch. Keys for one guest on one platform, wrapped for its firmware.

The owner holds TIK (proves the measurement) and TEK (hides secrets); the host carries only `dh_cert` and `session`.
Keys never appear in a repr. A secret can be sealed only after `verify` said yes, and only for what it said yes to: the
packet's MAC covers that measurement, so no other guest's firmware opens it.

An owner who is not the host keeps a session in a folder between the steps (`save`, `load`). The files are what other
owners' tools write and read: `godh.cert` and `launch_blob.bin` for the host (names and contents of AMD's SEV tool, and
sevctl's without Base64), `tek.bin` and `tik.bin` for nobody else (16 bytes each, as sevctl). `policy.txt` is ours.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from kvmapi import certificates
from kvmapi import session_crypto as crypto
from kvmapi.abi import cert as c
from kvmapi.errors import KvmApiError
from kvmapi.measurement import VERSION_IN_MAC, expected_measure, same
from kvmapi.wiping import wipe

DH_CERT, SESSION, TEK, TIK, POLICY = "godh.cert", "launch_blob.bin", "tek.bin", "tik.bin", "policy.txt"
_SIZES = {DH_CERT: c.SEV_CERT_SIZE, SESSION: c.SEV_SESSION_SIZE, TEK: crypto.KEY_SIZE, TIK: crypto.KEY_SIZE}
_LONGEST_POLICY = 16


class OwnerError(KvmApiError):
    """The owner's side refuses: a secret for a guest that nobody verified, or a saved session that is not one."""


@dataclass(slots=True, eq=False)
class OwnerSession:
    """`dh_cert` (2084 bytes) and `session` (128) go into LAUNCH_START; `tek` and `tik` stay with the owner.

    >>> owner = OwnerSession.create(pdh_cert, policy=0)           # doctest: +SKIP
    >>> started = Launch(vm, sev).start(0, owner.dh_cert, owner.session)       # doctest: +SKIP
    """

    policy: int
    dh_cert: bytes = field(repr=False)
    session: bytes = field(repr=False)
    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)
    _verified: dict[bytes, bool] = field(default_factory=dict, repr=False, init=False)  # measure -> goes into packets

    @classmethod
    def create(cls, pdh_cert: bytes, policy: int) -> OwnerSession:
        """New keys for a guest with `policy` on the platform whose PDH certificate this is.

        The certificate's chain is not checked here; an owner who does not trust the host checks it first
        (`kvmapi.certificates`). Raises ValueError if the certificate is malformed.
        """
        private = certificates.new_key()
        z = certificates.shared_secret(private, certificates.cert_key(certificates.parse_cert(pdh_cert)))
        tek, tik = secrets.token_bytes(crypto.KEY_SIZE), secrets.token_bytes(crypto.KEY_SIZE)
        blob = crypto.wrap_session(z, tek, tik, policy, nonce=secrets.token_bytes(16), iv=secrets.token_bytes(16))
        wipe(z)
        certificate = certificates.make_cert(private.public_key(), c.SEV_USAGE_PDH, c.SEV_ALGO_ECDH_SHA256)
        return cls(policy, bytes(certificate), blob, tek, tik)

    def forget(self) -> None:
        """Overwrite the keys: the launch is over, and nothing is to be opened or proved any more."""
        wipe(self.tek)
        wipe(self.tik)

    # --- between the steps

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the session to `folder`, which is made if need be (mode 0700); files have mode 0600.

        Raises `OwnerError` (nothing is overwritten: a session that is there may be the only key to a guest) or OSError.
        """
        place = Path(folder)
        contents = {DH_CERT: self.dh_cert, SESSION: self.session, TEK: self.tek, TIK: self.tik, POLICY: f"{self.policy:#x}\n".encode()}
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = [name for name in contents if os.path.lexists(place / name)]
        if taken:
            raise OwnerError(f"{place} holds a session already ({', '.join(taken)}): use another folder")
        written = []
        try:
            for name, data in contents.items():
                fd = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                written.append(place / name)
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, folder: str | os.PathLike[str], policy: int | None = None) -> OwnerSession:
        """Read what `save` wrote, or another tool's files with the `policy` they were made for.

        Raises `OwnerError` if a file has another size, or if keys, blob and policy do not belong together; OSError.
        """
        place = Path(folder)
        data = {name: _read(place / name, size) for name, size in _SIZES.items()}
        if policy is None:
            policy = _policy(place / POLICY)
        try:
            certificates.cert_key(certificates.parse_cert(data[DH_CERT]))
        except ValueError as wrong:
            raise OwnerError(f"{place / DH_CERT}: {wrong}") from None
        policy_mac = bytes(c.sev_session.from_buffer_copy(data[SESSION]).policy_mac)
        if not same(policy_mac, crypto.mac(data[TIK], policy.to_bytes(4, "little"))):
            raise OwnerError(f"{place}: {SESSION}, {TIK} and policy {policy:#x} do not belong together")
        return cls(policy, data[DH_CERT], data[SESSION], data[TEK], data[TIK])

    # --- after the measurement

    def expected_measure(self, digest: bytes, nonce: bytes, *, api_major: int, api_minor: int, build: int) -> bytes:
        """What LAUNCH_MEASURE should return for this digest and the firmware's nonce."""
        return expected_measure(self.tik, digest, nonce, policy=self.policy, api_major=api_major, api_minor=api_minor, build=build)

    def verify(self, measure: bytes, digest: bytes, nonce: bytes, *, api_major: int, api_minor: int, build: int) -> bool:
        """Whether the firmware measured what the owner expects. From a yes on, secrets can be sealed for that guest."""
        right = same(measure, self.expected_measure(digest, nonce, api_major=api_major, api_minor=api_minor, build=build))
        if right:
            self._verified[bytes(measure)] = (api_major, api_minor) >= VERSION_IN_MAC
        return right

    def seal_secret(self, plaintext: bytes | bytearray, measure: bytes) -> tuple[bytes, bytes]:
        """Header and ciphertext of a secret for the guest with this `measure`, for LAUNCH_SECRET.

        Raises `OwnerError` unless `verify` said yes to that measure.
        """
        included = self._verified.get(bytes(measure))
        if included is None:
            raise OwnerError("no secret is sealed for a guest whose measurement was not verified: verify() must say yes to it first")
        copy = bytes(plaintext)
        try:
            return crypto.seal_secret(self.tek, self.tik, copy, secrets.token_bytes(16), measure=measure if included else None)
        finally:
            if copy is not plaintext:
                wipe(copy)


def _read(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(size + 1)
    if len(data) != size:
        raise OwnerError(f"{path}: {'more' if len(data) > size else len(data)} bytes, where {size} are expected")
    return data


def _policy(path: Path) -> int:
    try:
        with path.open() as file:
            policy = int(file.read(_LONGEST_POLICY + 1), 16)
    except FileNotFoundError:
        raise OwnerError(f"{path} is not there: say which policy the session was made for") from None
    except ValueError:
        raise OwnerError(f"{path}: no policy in hex") from None
    if not 0 <= policy < 1 << 32:
        raise OwnerError(f"{path}: {policy:#x} does not fit the 32 bits of a policy")
    return policy
