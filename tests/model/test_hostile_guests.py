"""Random bytes executed as 64-bit code: each run ends in an exit or a kick; no exception, no crash of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE

pytestmark = pytest.mark.model
PROGRAM = """
import collections, faulthandler, random, sys, threading
faulthandler.enable()
sys.path.insert(0, {tree!r})
from kvmapi.model.host import ModelHost
from kvmapi.exits import Exit
from tests.conformance.snippets import CODE, DATA, LongGuest
from tests.model.sev_guest import SevGuest

host = ModelHost()
rng = random.Random({seed})
# Half of the bytes are random, half come from pieces that reach further than random bytes do.
PIECES = [bytes.fromhex(text) for text in (
    "0f22c0 0f22d8 0f22e0 0f20c0 0f01d9 0f01c1 0f30 0f32 0fa2 f4 e610 ef 6e f36e f36c cd14 0f0b cf 0f01f8 0f05 0f07 0f34 0f35"
    " f30f01e8 0fae00 0fae08 8ed8 0f00d8 0f0118 0f0110 c3 ff23 48ff2b 0fc7 f00fc10b 8b03 8903 668cd8 0f09 0f08 0f7800"
).split()]
count = collections.Counter()
for number in range({snippets}):
    text = b""
    while len(text) < 64:
        text += rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 6))
    guest = (SevGuest if number % 4 == 0 else LongGuest)(host, text[:64])
    with guest:
        values = {name: rng.choice([0, 1, DATA, CODE, 0xD0000000, 0x40030000, 0x3FE00000, 1 << 47, (1 << 64) - 8, 0xC0000080, 0x10])
                  for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8")}
        guest.regs(rip=CODE, **values)
        timer = threading.Timer(0.02, guest.vcpu.request_exit)
        timer.start()
        for _ in range(20):
            error = guest.vcpu.run()
            exit = guest.vcpu.exit(error)
            assert isinstance(exit, Exit), exit
            count[exit.name] += 1
            if error or exit.name in ("SHUTDOWN", "INTERNAL_ERROR", "HLT"):
                break
        timer.cancel()
        timer.join()
        guest.vcpu.request_exit(False)
        guest.regs()
        guest.vcpu.get_sregs()
print(dict(count))
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_random_code(tree: Path, seed: int) -> None:
    program = PROGRAM.replace("{tree!r}", repr(str(tree))).replace("{seed}", str(seed)).replace("{snippets}", "150")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60 * PATIENCE, cwd=tree, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
