"""GpaMap under a guest that flips every other page: time and memory, in a process of its own so that nothing else counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchlib.entry import TREE, Measured, entry

FLIPS = 8 << 20
MEMORY = 64 << 30
TARGET_MIB = 3

_PROGRAM = """
import gc, json, sys, time
from vmm.gpamap import GpaMap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

flips, memory = int(sys.argv[1]), int(sys.argv[2])
m = GpaMap()
m.add_slot(0, 0, memory)
set_page = m.set_page
set_page(0, True); set_page(0, False)
gc.collect()
before = resident()
start = time.perf_counter()
for gfn in range(0, 2 * flips, 2):
    set_page(gfn, True)
elapsed = time.perf_counter() - start
print(json.dumps({"s": elapsed, "mib": (resident() - before) / 1048576, "private_pages": m.private_pages()}))
"""


@entry("gpamap_flips", "s", 4)
def gpamap_flips() -> Measured:
    """8,388,608 one-page flips, every other page of 64 GiB: time, and at most 3 MiB of memory."""
    command = [sys.executable, "-c", _PROGRAM, str(FLIPS), str(MEMORY)]
    environ = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    right = found["private_pages"] == FLIPS
    detail = {"flips": FLIPS, "mib": round(found["mib"], 3), "target_mib": TARGET_MIB, "us_per_flip": round(found["s"] / FLIPS * 1e6, 3)}
    return Measured(found["s"], found["s"] <= 4 and found["mib"] <= TARGET_MIB and right, detail)
