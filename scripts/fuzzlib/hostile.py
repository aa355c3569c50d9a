"""Hostile code in a guest of the model: random bytes and mutated instructions, in every mode, with random page tables.

One VM serves many snippets. `Machine.one(index)` makes everything anew from the seed and the index: memory is a copy of
a prepared image (descriptor tables, page tables of three kinds, handlers), in which some entries of the tables are then
made to point at themselves, at their parent, outside memory or to have reserved bits. KVM_SET_SREGS and KVM_SET_REGS
put the vCPU where it begins: real mode, protected mode with and without paging, PAE, 64-bit and compatibility code, rings
0 and 3. In one of twenty the second vCPU writes over the first one's code and tables while both run.

Every KVM_RUN must come back with an exit that has a type, or with EINTR after the watchdog set immediate_exit.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
import threading
from collections import Counter
from typing import Any

from kvmapi.abi.run import kvm_run
from kvmapi.abi.vcpu import kvm_regs, kvm_segment, kvm_sregs
from kvmapi.exits import Exit, Io, Mmio, RunFailed, Unknown
from kvmapi.host import Host
from kvmapi.system import System
from tests.differential.templates import TABLE, Pointers, instruction
from tests.differential.traced import CODE as TEMPLATE_CODE

SIZE = 1 << 20
PML4, PDPT, PD, PT, PAE_PDPT, PAE_PD, FLAT_PD, GDT, IDT, TSS, HANDLERS, CODE, STACK, DATA = (0x1000 * n for n in range(1, 15))
TABLES = (PML4, PDPT, PD, PT, PAE_PDPT, PAE_PD, FLAT_PD)
IDT32 = IDT + 0x800
_IMAGE_SIZE = 0x20000
_SELECTORS = (0, 8, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x38, 0x1B, 0x7F)
MODES = ("real", "protected", "paged", "pae", "long", "user", "compatible")
_PATIENCE = 0.002  # seconds in one KVM_RUN
_EXITS = 4  # KVM_RUNs of one snippet
_IMMEDIATE_EXIT = kvm_run.immediate_exit.offset
_REACHING = """
    0f22c0 0f22d8 0f22e0 0f20c0 0f01d9 0f01c1 0f30 0f32 0fa2 f4 e610 ef 6e f36e f36c cd14 0f0b cf 0f01f8 0f05 0f07 0f34
    0f35 48cf 0f3f f30f01e8 0fae00 0fae08 0fae20 0fae28 8ed8 8ed0 0f00d8 0f00d0 0f0118 0f0110 c3 cb ff23 ff2b 48ff2b 0fc7
    f00fc10b 8b03 8903 668cd8 0f09 0f08 0f7800 f00fb3c6 f00fbaf801 ea00000000 9a00000000 f3a4 f3aa f348ab ebfe e2fe 0f0138
    0f23c0 0f23f8 9d 48b8 0f01d1 fb fa f390 0fc7f0
"""
_PIECES = [bytes.fromhex(text) for text in _REACHING.split()]


def _image() -> bytes:
    """Memory as every snippet begins with it."""
    memory = bytearray(_IMAGE_SIZE)

    def put(at: int, *words: int) -> None:
        struct.pack_into(f"<{len(words)}Q", memory, at, *words)

    put(PML4, PDPT | 7)
    put(PDPT, PD | 7)
    put(PD, PT | 7, 0x200087 & 0x87)
    put(PT, *(n << 12 | 7 for n in range(256)))
    put(PAE_PDPT, PAE_PD | 1)
    put(PAE_PD, PT | 7, 0x87)
    struct.pack_into("<2I", memory, FLAT_PD, 0x87, 0x87)
    put(GDT, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF,
        TSS << 16 | 0x8B0000000067, 0)  # fmt: skip
    for vector in range(32):
        entry, selector = HANDLERS + 16 * vector, 0x18
        struct.pack_into("<HHHHII", memory, IDT + 16 * vector, entry, selector, 0xEE00, 0, 0, 0)
        struct.pack_into("<HHHH", memory, IDT32 + 8 * vector, HANDLERS if vector in (3, 4) else HANDLERS + 0x20, 8, 0xEE00, 0)
        memory[entry : entry + 3] = b"\x48\xcf\xf4" if vector in (1, 3, 4, 16) else b"\xf4\xeb\xfd"
    put(TSS + 4, STACK + 0x800)
    return bytes(memory)


IMAGE = _image()


def _segment(selector: int, kind: int, dpl: int, **bits: int) -> kvm_segment:
    return kvm_segment(
        **{"limit": 0xFFFFFFFF, "selector": selector, "type": kind, "present": 1, "s": 1, "dpl": dpl, "g": 1, "db": 1, **bits}
    )


def _states(reset: kvm_sregs) -> dict[str, kvm_sregs]:
    """KVM_SET_SREGS's argument of each mode."""
    found = {}
    for mode in MODES:
        sregs = kvm_sregs.from_buffer_copy(reset)
        found[mode] = sregs
        sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = GDT, 0x47, IDT, 0x1FF
        if mode == "real":
            sregs.cs.base = sregs.cs.selector = 0
            sregs.idt.base, sregs.idt.limit = 0, 0x3FF
            continue
        ring = 3 if mode in ("user", "compatible") else 0
        wide = mode in ("long", "user")
        code = {"long": 0x18, "user": 0x33, "compatible": 0x23}.get(mode, 8)
        sregs.cs = _segment(code, 0xB, ring, l=wide, db=not wide)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(0x2B if ring else 0x10, 3, ring))
        sregs.tr = kvm_segment(base=TSS, limit=0x67, selector=0x38, type=0xB, present=1)
        sregs.cr0, sregs.cr4 = 0x33, 0x610
        if mode in ("protected", "paged", "pae"):
            sregs.idt.base, sregs.idt.limit = IDT32, 0xFF
        if mode == "paged":
            sregs.cr0, sregs.cr3 = 0x80010033, FLAT_PD
        elif mode == "pae":
            sregs.cr0, sregs.cr3, sregs.cr4 = 0x80010033, PAE_PDPT, 0x620
        elif mode != "protected":
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, PML4, 0x620, 0xD01
    return found


class Machine:
    """The VM, its two vCPUs, the second one's thread, and the watchdog."""

    def __init__(self, host: Host, seed: int, note: Any) -> None:
        self._seed = seed
        self._note = note
        self.counts: Counter[str] = Counter()
        self.system = System(host)
        self.vm = self.system.create_vm(0)
        self._memory = mmap.mmap(-1, SIZE)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.vm.set_user_memory_region(0, 0, SIZE, self._at)
        self.vcpus = [self.vm.create_vcpu(number) for number in range(2)]
        for vcpu in self.vcpus:
            vcpu.set_cpuid2(self.system.supported_cpuid())
        self._states = _states(self.vcpus[0].get_sregs())
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._open = True
        self._failed: BaseException | None = None
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._second, self._watch)]
        self._runs = [0, 0]
        self._wake = threading.Event()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Give everything back."""
        self._open = False
        self._turn.release()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.system.close()

    # ---- one snippet
    def one(self, index: int) -> str:
        """Run snippet `index`; its mode. Raises what no guest may cause."""
        rng = random.Random(self._seed << 40 | index)
        mode = rng.choice(MODES)
        ctypes.memmove(self._at, IMAGE, _IMAGE_SIZE)
        if mode == "real":
            self._memory[:1024] = struct.pack("<HH", HANDLERS, 0) * 256
        text = self.text(rng, mode)
        at = CODE if rng.random() < 0.95 else CODE + 0x1000 - rng.randrange(1, 16)
        self._memory[at : at + len(text)] = text
        if rng.random() < 0.25:
            self._spoil_tables(rng)
        self._begin(0, mode, at, rng)
        both = rng.random() < 0.05
        if both:
            self._begin(1, "long", self._rewriter(rng), rng)
            self.vcpus[1].set_regs(kvm_regs(rip=DATA + 0x800, rsp=STACK + 0x100, rflags=2, rdi=rng.choice((CODE, *TABLES)), rcx=1 << 20,
                                            rax=rng.getrandbits(64)))  # fmt: skip
            self._turn.release()
        try:
            self._run(0, rng)
        finally:
            if both:
                self._done.acquire()
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        return mode

    def text(self, rng: random.Random, mode: str) -> bytes:
        """Code: random bytes, pieces that reach far, and instructions of the templates, some with a byte changed."""
        bits = 64 if mode in ("long", "user") else 32
        about = Pointers([DATA + 0x80 * n for n in range(16 if bits == 64 else 8)], DATA, DATA, bits)
        out = bytearray()
        groups = list(TABLE)
        while len(out) < 48:
            kind = rng.random()
            if kind < 0.25:
                out += rng.randbytes(rng.randrange(1, 6))
            elif kind < 0.55:
                out += rng.choice(_PIECES)
            else:
                _, made = instruction(rng, rng.choice((*groups, "wild")), about)
                made = made.replace((TEMPLATE_CODE >> 12).to_bytes(3, "little"), (DATA >> 12).to_bytes(3, "little"))
                if rng.random() < 0.15:
                    where = rng.randrange(len(made))
                    made = made[:where] + rng.randbytes(1) + made[where + 1 :]
                out += made
        return bytes(out)

    def _spoil_tables(self, rng: random.Random) -> None:
        for _ in range(rng.randrange(1, 4)):
            table = rng.choice(TABLES)
            entry = rng.choice((0, 0, 0, 1, rng.randrange(512)))
            value = rng.choice(
                (table | 7, table | 0x87, PML4 | 7, PT | 7, 0, rng.getrandbits(64), (1 << 51) | PT | 7, SIZE | 7, (1 << 46) | 7, PD | 6,
                 0xFFFFF000 | 7, PDPT | 3, 1 << 63 | PT | 7)
            )  # fmt: skip
            struct.pack_into("<Q", self._memory, table + 8 * entry, value)
        if rng.random() < 0.1:
            struct.pack_into("<Q", self._memory, GDT + 8 * rng.randrange(9), rng.getrandbits(64))
        if rng.random() < 0.1:
            struct.pack_into("<Q", self._memory, IDT + 8 * rng.randrange(64), rng.getrandbits(64))

    def _rewriter(self, rng: random.Random) -> int:
        """Code of the second vCPU: it fills what RDI points to, again and again."""
        fill = rng.choice((b"\xaa", b"\x48\xab", b"\xab"))
        self._memory[DATA + 0x800 : DATA + 0x840] = (fill + b"\x48\x81\xe7" + struct.pack("<I", 0xFFFF) + b"\xe2\xf4").ljust(64, b"\xf4")
        return DATA + 0x800

    def _begin(self, number: int, mode: str, rip: int, rng: random.Random) -> None:
        vcpu = self.vcpus[number]
        vcpu.set_sregs(self._states[mode])
        wild = (0, 1, DATA, CODE, STACK, 0xD0000000, SIZE - 4, 1 << 47, (1 << 64) - 8, 0xC0000080, 0xFFFF, rng.getrandbits(64), *TABLES)
        names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
        regs = kvm_regs(rip=rip, rsp=STACK + 0x700, rflags=2 | (rng.getrandbits(22) & 0x3C4DD5 if rng.random() < 0.2 else 0))
        for name in names:
            setattr(regs, name, rng.choice(wild))
        vcpu.set_regs(regs)

    # ---- running
    def _run(self, number: int, rng: random.Random) -> None:
        vcpu = self.vcpus[number]
        for _ in range(_EXITS):
            self._runs[number] += 1
            self._note(number, True)
            try:
                error = vcpu.run()
            finally:
                self._note(number, False)
            exit = vcpu.exit(error)
            if not isinstance(exit, Exit) or isinstance(exit, Unknown | RunFailed):
                raise TypeError(f"KVM_RUN returned {error} with an exit that has no type: {exit!r}")
            name = "timeout" if error == 4 else exit.name
            self.counts[name] += 1
            if isinstance(exit, Io) and not exit.is_out:
                vcpu.answer_io(exit, rng.randbytes(exit.size * exit.count))
            elif isinstance(exit, Mmio) and not exit.is_write:
                vcpu.answer_mmio(exit, rng.randbytes(exit.length))
            if error or name in ("SHUTDOWN", "INTERNAL_ERROR", "FAIL_ENTRY") or (name == "HLT" and rng.random() < 0.8):
                break
        vcpu.run_map[_IMMEDIATE_EXIT] = 0
        vcpu.get_regs()

    def _second(self) -> None:
        while True:
            self._turn.acquire()
            if not self._open:
                return
            try:
                self._run(1, random.Random(1))
            except BaseException as why:
                self._failed = why
            self._done.release()

    def _watch(self) -> None:
        """Whoever is in the same KVM_RUN for two looks is kicked."""
        seen = [0, 0]
        while self._open:
            self._wake.wait(_PATIENCE / 2)
            for number, vcpu in enumerate(self.vcpus):
                if self._runs[number] == seen[number] and vcpu.run_map is not None:
                    vcpu.run_map[_IMMEDIATE_EXIT] = 1
                seen[number] = self._runs[number]
