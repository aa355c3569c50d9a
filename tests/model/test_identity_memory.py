"""The platform's private keys are in no readable memory of the process that holds the model.

They are known here because they stand in a store's file. The other process loads them, uses each, draws new ones and
stores those; after each step all its readable memory is searched for them, as integers in either byte order (OpenSSL's
own numbers are little-endian words). Its certificates are found, so the search works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_der_private_key

from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.store import Store
from kvmapi.model.sev.vault import Vault
from tests.model.test_keys_stay_inside import found_in_memory

pytestmark = pytest.mark.model


def needles(path: Path) -> dict[str, bytes]:
    """The numbers of the private keys in a store, and as a control a part of a certificate."""
    record = Store(path).load()
    assert record is not None
    found = {}
    with record:
        for name in ("PDH", "PEK", "OCA", "CEK"):
            key = load_der_private_key(bytes(record.parts[f"{name}K".encode()]), None)
            assert isinstance(key, EllipticCurvePrivateKey)
            number = key.private_numbers().private_value
            found[f"{name}, big-endian"] = number.to_bytes(48, "big")[8:40]
            found[f"{name}, little-endian"] = number.to_bytes(48, "little")[8:40]
        found["control"] = bytes(record.parts[b"PEKC"])[20:60]
    return found


def test_private_keys_are_nowhere(tmp_path: Path, tree: Path) -> None:
    path = tmp_path / "platform"
    Identity(Vault(), Store(path)).export()
    old = needles(path)
    command = [sys.executable, "-m", "tests.model.identity_child", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with subprocess.Popen(command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdin is not None and child.stdout is not None
            assert child.stdout.readline() == "loaded\n"
            assert found_in_memory(child.pid, old) == {"control"}
            print(file=child.stdin, flush=True)
            assert child.stdout.readline() == "changed\n"
            new = needles(path)
            assert new["PDH, big-endian"] != old["PDH, big-endian"]
            assert found_in_memory(child.pid, {f"new {name}": needle for name, needle in new.items()}) == {"new control"}
            assert found_in_memory(child.pid, old) <= {"control"}
        finally:
            child.kill()
