"""Any ioctl, any argument, any fd, in any order, from three threads: an errno each time, and the model lives on.

Seeded, so that a failure can be repeated. Run in a process of its own: a crash is then a failure of the test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.model
CALLS = 30_000  # of each of three threads
PROGRAM = """
import ctypes, faulthandler, mmap, os, random, sys, threading, time
faulthandler.enable()
sys.path.insert(0, {tree!r})
from kvmapi.abi import ioctls, psp
from kvmapi.model.host import ModelHost
from tests.conftest import device_mappings, open_fds
from tests.conformance.snippets import LongGuest
from kvmapi.exits import Hlt

host = ModelHost()
with LongGuest(host, bytes([0xF4])) as guest:  # warm up: caches of the library are no leaks
    assert guest.run() == Hlt()
REQUESTS = [value for name, value in vars(ioctls).items() if name.startswith("KVM_") and isinstance(value, int)]
REQUESTS += [psp.SEV_ISSUE_CMD, 0, 0xAEFF, 0xFFFFFFFF, 1 << 40, -1]
HEAVY = [getattr(ioctls, "KVM_" + name) for name in (
    "CREATE_VM", "CREATE_VCPU", "RUN", "SET_USER_MEMORY_REGION", "SET_USER_MEMORY_REGION2", "SET_MEMORY_ATTRIBUTES",
    "CREATE_GUEST_MEMFD", "MEMORY_ENCRYPT_OP", "MEMORY_ENCRYPT_REG_REGION", "SET_SREGS", "SET_REGS", "SET_CPUID2", "ENABLE_CAP")]
fds, lock, odd = [], threading.Lock(), []
ram = mmap.mmap(-1, 1 << 20)
ram_at = ctypes.addressof(ctypes.c_char.from_buffer(ram))
buffer = mmap.mmap(-1, 1 << 16)
buffer_at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))

import gc
gc.collect()
fds_before, maps_before = set(open_fds()), device_mappings()

def numbers(rng):
    some = [0, 1, 2, 3, 4, 8, 16, 22, 48, 4096, 1 << 20, ram_at, buffer_at, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096]
    some += fds[:4]
    words = [rng.choice(some) if rng.random() < 0.8 else rng.getrandbits(64) for _ in range(24)]
    if rng.random() < 0.5:  # pairs of 32 bits
        words = [(a & 0xFFFFFFFF) | (rng.choice(some) & 0xFFFFFFFF) << 32 for a in words]
    return b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in words)

def argument(rng):
    kind = rng.random()
    if kind < 0.15:
        return rng.choice([0, 1, 2, 8, 7, 4095, 1 << 47, 1 << 63, (1 << 64) - 1, -1, 0xFFFF888000000000])
    at = rng.randrange(0, 1 << 12, rng.choice([1, 8]))
    buffer[at : at + 192] = numbers(rng)
    if kind < 0.2:
        return buffer_at + (1 << 16) - rng.randrange(64)  # runs off the end
    return buffer_at + at

def kick(fd):
    with lock:  # nobody may put another file behind the fd meanwhile: touching a private guest_memfd is SIGBUS
        try:
            host.runner(fd)
            with host.mmap(fd, 8192) as page:
                page[1] = 1
        except OSError:
            pass

def worker(seed):
    rng = random.Random(seed)
    for number in range({calls}):
        with lock:
            fd = rng.choice(fds) if fds and rng.random() < 0.97 else rng.choice([-1, 0, 999999, 1 << 33])
        request = rng.choice(HEAVY if rng.random() < 0.6 else REQUESTS)
        arg = argument(rng)
        if request == ioctls.KVM_RUN:
            kick(fd)
            arg = 0 if rng.random() < 0.9 else arg
        if request in (ioctls.KVM_CREATE_VM, ioctls.KVM_CREATE_VCPU):
            arg = rng.choice([0, 1, 2, 3, arg])
        try:
            result = host.ioctl(fd, request, arg)
        except BaseException as error:
            import traceback
            odd.append((hex(request), hex(arg), traceback.format_exc()))
            continue
        if type(result) is not int or result < -4095:
            odd.append((hex(request), result))
        elif request in (ioctls.KVM_CREATE_VM, ioctls.KVM_CREATE_VCPU, ioctls.KVM_CREATE_GUEST_MEMFD) and result > 2:
            with lock:
                fds.append(result)
        with lock:
            if len(fds) > 12:
                host.close(fds.pop(rng.randrange(2, len(fds))))

fds += [host.open("/dev/kvm", os.O_RDWR), host.open("/dev/sev", os.O_RDWR)]
start = time.monotonic()
threads = [threading.Thread(target=worker, args=(1000 + n,), daemon=True) for n in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join(timeout=40)
hung = [thread for thread in threads if thread.is_alive()]
if hung: faulthandler.dump_traceback()
for fd in fds: host.close(fd)
with LongGuest(host, bytes([0xF4])) as guest:
    assert guest.run() == Hlt()
gc.collect()
left = set(open_fds()) - fds_before
names = open_fds()
print("seconds", round(time.monotonic() - start, 1), "odd", len(odd), "hung", len(hung), "fds", {fd: names[fd] for fd in left})
for line in odd[:5]: print(*line)
maps = device_mappings()
if maps != maps_before: print("mappings", [m for m in maps if m not in maps_before][:5], len(maps), len(maps_before))
sys.exit(bool(odd or hung or left or maps != maps_before))
"""


def test_fuzz(tree: Path) -> None:
    program = PROGRAM.replace("{tree!r}", repr(str(tree))).replace("{calls}", str(CALLS))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tree, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
