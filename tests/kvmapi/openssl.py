"""OpenSSL's command line as the judge of signatures, from the bytes of certificates alone: nothing of the project's parsing is used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32", "-sigopt", "rsa_mgf1_md:sha256")


def der(tag: int, content: bytes) -> bytes:
    length = len(content)
    head = bytes((length,)) if length < 0x80 else bytes((0x82,)) + length.to_bytes(2, "big")
    return bytes((tag,)) + head + content


def integer(little: bytes) -> bytes:
    value = int.from_bytes(little, "little")
    return der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def spki(algorithm: str, key: bytes) -> bytes:
    return der(0x30, bytes.fromhex(algorithm) + der(3, b"\0" + key))


def p384(certificate: bytes) -> bytes:
    """SubjectPublicKeyInfo from the bytes of an SEV certificate: X at 20, Y at 92."""
    point = b"\x04" + certificate[20:68][::-1] + certificate[92:140][::-1]
    return spki("301006072a8648ce3d020106052b81040022", point)


def rsa2048(certificate: bytes) -> bytes:
    """The same from the bytes of an ASK or ARK: exponent at 64, modulus at 320."""
    key = der(0x30, integer(certificate[320:576]) + integer(certificate[64:320]))
    return spki("300d06092a864886f70d0101010500", key)


def ecdsa(slot: bytes) -> bytes:
    """r and s from the bytes of a signature slot, behind its usage and algorithm."""
    return der(0x30, integer(slot[:72]) + integer(slot[72:144]))


class Judge:
    """Does `openssl dgst -sha256` accept this signature of `data`? Skips where there is no openssl."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command; get it: apt install openssl")
        self.folder = folder

    def __call__(self, key: bytes, data: bytes, signature: bytes, *options: str) -> bool:
        for name, content in (("key.der", key), ("data", data), ("sig", signature)):
            (self.folder / name).write_bytes(content)
        command = ["openssl", "dgst", "-sha256", "-keyform", "DER", "-verify", "key.der", *options, "-signature", "sig", "data"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60)
        assert "Verified OK" in done.stdout or "Verification failure" in done.stdout, done.stderr
        return done.returncode == 0
