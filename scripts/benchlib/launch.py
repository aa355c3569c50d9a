"""What the model's SEV firmware costs: measuring and encrypting memory at launch, and one page at run time.

The launch is judged against `openssl speed` of SHA-256 and AES-128-XTS on the same machine, in the same run and in turn:
the yardstick is what the two would take one after the other. It runs in a process of its own, so that its peak memory
can be told from the bench's.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchlib.entry import TREE, Measured, Skipped, entry, interleaved, median, need

if TYPE_CHECKING:
    from kvmapi.model.mem.cipher import Workspace

ROUNDS = 5
SIZE = 256 << 20
EXTRA_LIMIT = 64 << 20
_PAGE, _PAGES = 4096, 4000
_BLOCK = 16384
_HASH, _CIPHER = "sha256", "aes-128-xts"

# Prints seconds for LAUNCH_UPDATE_DATA of SIZE bytes and by how many bytes the process's peak memory grew beyond them.
_LAUNCH = """
import ctypes, json, mmap, resource, sys, time
from kvmapi.launch import Launch
from kvmapi.model.host import ModelHost
from kvmapi.sev import SevPlatform
from kvmapi.system import System
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.memset(address, 0x5A, size)
host = ModelHost()
with System(host) as system, system.create_vm(2) as vm, SevPlatform(host) as sev:
    vm.set_user_memory_region(0, 0, size, address)
    started = Launch(vm, sev).init2().start(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    started.update_data(address, size)
    seconds = time.perf_counter() - begin
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert ctypes.string_at(address, 16) != b"\\x5a" * 16
print(json.dumps({"seconds": seconds, "extra": extra}))
"""


def _openssl(algorithm: str) -> float:
    """Bytes a second."""
    command = ["openssl", "speed", "-seconds", "1", "-bytes", str(_BLOCK), "-evp", algorithm]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"([\d.]+)k\s*$", output)
    if found is None:
        raise Skipped(f"openssl speed -evp {algorithm} prints no rate")
    return float(found[1]) * 1000


@entry("launch_vs_openssl", "ratio", 0.5, at_least=True)
def launch_vs_openssl() -> Measured:
    """LAUNCH_UPDATE_DATA of 256 MiB relative to openssl's SHA-256 and AES-XTS one after the other (below 64 MiB of extra memory)."""
    need("model")
    if shutil.which("openssl") is None:
        raise Skipped("needs the openssl command: apt install openssl")
    extra: list[int] = []

    def launch() -> float:
        done = subprocess.run([sys.executable, "-c", _LAUNCH, str(SIZE)], capture_output=True, text=True, check=True, timeout=120, cwd=TREE)
        result = json.loads(done.stdout)
        extra.append(result["extra"])
        return SIZE / float(result["seconds"])

    ours, hashes, ciphers = interleaved(ROUNDS, launch, lambda: _openssl(_HASH), lambda: _openssl(_CIPHER))
    ratios = [rate * (1 / fast + 1 / faster) for rate, fast, faster in zip(ours, hashes, ciphers, strict=True)]
    detail = {
        "launch_mib_s": round(median(ours) / (1 << 20)),
        f"{_HASH}_mib_s": round(median(hashes) / (1 << 20)),
        f"{_CIPHER}_mib_s": round(median(ciphers) / (1 << 20)),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "extra_mib": round(max(extra) / (1 << 20), 1),
    }
    value = median(ratios)
    return Measured(value, None if max(extra) < EXTRA_LIMIT else False, detail)


@entry("page_crypt_us", "us", 12)
def page_crypt() -> Measured:
    """Decrypting or encrypting one 4 KiB page of an SEV guest, the dearer of the two, inside KVM_RUN or a command.

    The vault's door is opened once for each of these, not for a page; `alone_*` is a page with a door of its own.
    """
    need("model")
    from kvmapi.model.mem.arena import Arena
    from kvmapi.model.mem.cipher import PageCipher
    from kvmapi.model.sev.vault import Vault

    cipher, arena, page = PageCipher(Vault()), Arena(), bytes(_PAGE)
    arena.open_door()

    def each(call: Callable[[int, bytes, Workspace], object]) -> float:
        begin = time.perf_counter()
        for number in range(_PAGES):
            call(number * _PAGE, page, arena.work)
        return (time.perf_counter() - begin) / _PAGES * 1e6

    def inside(call: Callable[[int, bytes, Workspace], object]) -> float:
        with cipher.vault:
            return each(call)

    sides = {
        "decrypt_us": lambda: inside(cipher.decrypt_part),
        "encrypt_us": lambda: inside(cipher.encrypt_part),
        "alone_decrypt_us": lambda: each(cipher.decrypt_part),
        "alone_encrypt_us": lambda: each(cipher.encrypt_part),
    }
    results = interleaved(ROUNDS, *sides.values())
    medians = {name: round(median(values), 2) for name, values in zip(sides, results, strict=True)}
    return Measured(max(medians["decrypt_us"], medians["encrypt_us"]), None, medians)
