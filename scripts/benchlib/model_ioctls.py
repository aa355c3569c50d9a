"""Ioctls on the software model that concern memory, and what a large sparse guest costs in memory."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time

from benchlib.entry import TREE, Measured, entry, median, need

MIB = 1 << 20
PAGE = 4096
SLOTS = 1000
ROUNDS = 300

_SPARSE = """
import json, mmap, random, struct, sys
def resident():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss"))
SIZE, PAGES = 64 << 30, 1000
before = resident()
from kvmapi.abi import kvm
from kvmapi.abi.vcpu import kvm_regs, kvm_segment
from kvmapi.exits import Hlt
from kvmapi.model.host import ModelHost
from kvmapi.system import System
import ctypes
memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
system = System(ModelHost())
vm = system.create_vm(int(sys.argv[1]))
vm.set_user_memory_region(0, 0, SIZE, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
memory[0x1000:0x1008] = struct.pack("<Q", 0x2003)
memory[0x2000:0x3000] = b"".join(struct.pack("<Q", n << 30 | 0x83) for n in range(512))
memory[0x10000:0x10004] = bytes.fromhex("488907f4")  # mov [rdi], rax; hlt
vcpu = vm.create_vcpu(0)
vcpu.set_cpuid2(system.supported_cpuid())
sregs = vcpu.get_sregs()
sregs.cs = kvm_segment(limit=0xFFFFFFFF, selector=8, type=11, present=1, s=1, l=1, g=1)
for name in ("ds", "es", "fs", "gs", "ss"):
    setattr(sregs, name, kvm_segment(limit=0xFFFFFFFF, selector=16, type=3, present=1, s=1, db=1, g=1))
sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, 0x1000, 0x620, 0xD01
vcpu.set_sregs(sregs)
touched = {0, 0x1000, 0x2000, 0x10000}
rng = random.Random(1)
for number in range(PAGES):
    gpa = rng.randrange(1 << 20, SIZE) & -4096
    touched.add(gpa)
    vcpu.set_regs(kvm_regs(rip=0x10000, rdi=gpa, rax=number, rflags=2))
    assert vcpu.exit(vcpu.run()) == Hlt()
print(json.dumps({"mib": (resident() - before - len(touched) * 4) / 1024, "pages": PAGES}))
"""


def _machine(type: int = 0) -> tuple[object, object, int]:
    """(host, VM of the model with a vCPU, address of 2 MiB of memory)."""
    import mmap

    from kvmapi.model.host import ModelHost
    from kvmapi.system import System

    host = ModelHost()
    vm = System(host).create_vm(type)
    memory = mmap.mmap(-1, 2 * MIB)
    vm.create_vcpu(0)
    return host, vm, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _microseconds(ioctl: object, fd: int, request: int, argument: ctypes.Structure, change: object) -> float:
    """Median over rounds of one ioctl; `change(round)` prepares its argument."""
    address = ctypes.addressof(argument)
    costs = []
    for number in range(ROUNDS):
        change(number)  # type: ignore[operator]
        start = time.perf_counter()
        result = ioctl(fd, request, address)  # type: ignore[operator]
        costs.append(time.perf_counter() - start)
        if result < 0:
            raise RuntimeError(f"errno {-result} in round {number}")
    return median(costs) * 1e6


@entry("model_slots_us", "us", 60)
def model_slots() -> Measured:
    """KVM_SET_USER_MEMORY_REGION on the model with 1,000 slots present: the slower of add, delete and move."""
    need("model")
    from kvmapi.abi import ioctls
    from kvmapi.abi.structs import kvm_userspace_memory_region

    host, vm, hva = _machine()
    for number in range(SLOTS):
        vm.set_user_memory_region(number, (16 + 2 * number) * MIB, MIB, hva)  # type: ignore[attr-defined]
    region = kvm_userspace_memory_region(SLOTS, 0, 0, PAGE, hva)
    ioctl, fd, request = host.ioctl, vm.fd, ioctls.KVM_SET_USER_MEMORY_REGION  # type: ignore[attr-defined]

    def add_or_delete(number: int) -> None:
        region.guest_phys_addr, region.memory_size = (17 + 2 * (number // 2)) * MIB, 0 if number % 2 else PAGE

    def move(number: int) -> None:
        region.slot, region.memory_size, region.guest_phys_addr = SLOTS // 2, MIB, (16 + SLOTS + number % 2) * MIB

    detail = {
        "add_delete_us": round(_microseconds(ioctl, fd, request, region, add_or_delete), 2),
        "move_us": round(_microseconds(ioctl, fd, request, region, move), 2),
    }
    return Measured(max(detail.values()), None, {**detail, "slots": SLOTS, "rounds": ROUNDS})


def _attributes(size: int) -> Measured:
    need("model")
    from kvmapi.abi import ioctls, kvm
    from kvmapi.abi.structs import kvm_memory_attributes

    host, vm, _ = _machine(kvm.KVM_X86_SW_PROTECTED_VM)
    argument = kvm_memory_attributes(0, size, 0, 0)

    def change(number: int) -> None:
        argument.attributes = 0 if number % 2 else kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE

    ioctl, fd = host.ioctl, vm.fd  # type: ignore[attr-defined]
    cost = _microseconds(ioctl, fd, ioctls.KVM_SET_MEMORY_ATTRIBUTES, argument, change)
    return Measured(cost, None, {"bytes": size, "rounds": ROUNDS})


@entry("model_attr_2m_us", "us", 30)
def model_attributes_2m() -> Measured:
    """KVM_SET_MEMORY_ATTRIBUTES on 2 MiB on the model."""
    return _attributes(2 * MIB)


@entry("model_attr_64g_us", "us", 5000)
def model_attributes_64g() -> Measured:
    """KVM_SET_MEMORY_ATTRIBUTES on 64 GiB on the model."""
    return _attributes(64 << 30)


@entry("model_sparse_mib", "MiB", 40)
def model_sparse() -> Measured:
    """Memory of a process for a 64 GiB guest on the model that touched 1,000 scattered pages, beyond those pages (the
    larger of plain and sw-protected; the interpreter itself is not counted).
    """
    need("model")
    sizes = {}
    for name, type in (("plain", 0), ("sw-protected", 1)):
        command = [sys.executable, "-c", _SPARSE, str(type)]
        done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=120, check=True)
        sizes[f"{name}_mib"] = round(json.loads(done.stdout)["mib"], 2)
    return Measured(max(sizes.values()), None, {**sizes, "pages": 1000, "guest_bytes": 64 << 30})
