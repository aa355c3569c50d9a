"""Keys and secrets are in no memory, no core and no object of the process that holds the model.

The owner is this process: it makes the session, knows every key in it, and gives the other process only what a host is
given. That one launches a guest, takes a secret, runs a vCPU, and stands still. Then all its readable memory is
searched, from outside, and a core of it (gdb's gcore), and its objects, from inside. What the host does know (its
session blob, its memory in ciphertext) is found, so the search works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmapi import certificates
from kvmapi import session_crypto as crypto
from kvmapi.abi import cert
from kvmapi.model.mem.arena import Arena

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]
_STEP = 8 << 20


@dataclass
class Child:
    """The other process, and what this one knows of its keys; `public` is what it may know itself."""

    process: subprocess.Popen[str]
    hidden: dict[str, bytes]
    public: bytes
    pieces: int

    def ask(self, needle: bytes) -> bool:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(needle.hex(), file=self.process.stdin, flush=True)
        return self.process.stdout.readline() == "01\n"


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.model.keyed_child"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield launch(process)
        finally:
            process.kill()


def launch(process: subprocess.Popen[str]) -> Child:
    assert process.stdin is not None and process.stdout is not None

    def receive() -> bytes:
        assert process.stdout is not None
        return bytes.fromhex(process.stdout.readline())

    def send(*blobs: bytes) -> None:
        for blob in blobs:
            print(blob.hex(), file=process.stdin, flush=True)

    pdh = receive()
    private = certificates.new_key()
    z = bytes(certificates.shared_secret(private, certificates.cert_key(certificates.parse_cert(pdh))))
    tek, tik, key, nonce, iv, secret = (os.urandom(size) for size in (16, 16, 32, 16, 16, 48))
    session = crypto.wrap_session(z, tek, tik, 0, nonce=nonce, iv=iv)
    own = certificates.make_cert(private.public_key(), cert.SEV_USAGE_PDH, cert.SEV_ALGO_ECDH_SHA256)
    send(bytes(own), session, bytes(byte ^ 0xFF for byte in key))
    header, ciphertext = crypto.seal_secret(tek, tik, secret, os.urandom(16), measure=receive())
    send(header, ciphertext)
    pieces = int(process.stdout.readline())
    kek, kik = crypto.wrapping_keys(z, nonce)
    hidden = {"Z": z, "master": crypto.kdf(z, 16, b"sev-master-secret", nonce), "KEK": kek, "KIK": kik, "TEK": tek, "TIK": tik}
    hidden |= {"memory key": key[:16], "memory tweak key": key[16:], "secret": secret[:16], "secret's end": secret[32:]}
    return Child(process, hidden, session[16:48], pieces)


def found_in_memory(pid: int, needles: dict[str, bytes]) -> set[str]:
    """The names of the needles in readable memory of a process."""
    names = set()
    rows = [line.split(None, 5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for row in rows:
            if "r" not in row[1] or row[-1].startswith("[v"):  # [vvar], [vsyscall]: the kernel's, not readable this way
                continue
            first, last = (int(text, 16) for text in row[0].split("-"))
            for at in range(first, last, _STEP):
                try:
                    data = os.pread(memory.fileno(), min(_STEP + 64, last - at), at)
                except OSError:
                    continue
                names |= {name for name, needle in needles.items() if needle in data}
    return names


def test_memory(child: Child) -> None:
    names = found_in_memory(child.process.pid, {**child.hidden, "control": child.public})
    assert names == {"control"}


def test_objects(child: Child) -> None:
    assert child.pieces > 1000
    assert [name for name, needle in child.hidden.items() if child.ask(needle)] == []
    assert child.ask(b"A vCPU enters KVM_RUN"), "the search reaches the model's own docstrings"


@pytest.mark.skipif(shutil.which("gcore") is None, reason="gcore is missing: apt install gdb")
def test_core(child: Child, tmp_path: Path) -> None:
    arena = Arena()
    arena.destroy()
    if not arena.secret:
        pytest.skip("this kernel has no memfd_secret (boot with secretmem.enable=1): a debugger reads through PROT_NONE")
    done = subprocess.run(
        ["gcore", "-o", str(tmp_path / "core"), str(child.process.pid)], capture_output=True, text=True, timeout=120, check=False
    )
    cores = list(tmp_path.glob("core.*"))
    if not cores and "ptrace" in done.stderr.lower():
        pytest.skip("this user may not trace its own processes: kernel.yama.ptrace_scope, or CAP_SYS_PTRACE in the container")
    assert cores, done.stderr
    data = cores[0].read_bytes()
    cores[0].unlink()
    assert child.public in data
    assert [name for name, needle in child.hidden.items() if needle in data] == []
