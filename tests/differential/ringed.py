"""A guest that runs a snippet as the traced child does: same addresses, same segments, ring 3 (or ring 0).

The guest's own things (descriptor tables, stack of ring 0, stubs) are in the upper half of the address space, where a
snippet of ring 3 may not go. A run enters a stub that loads an FXSAVE image and goes to the snippet by IRETQ; every
vector enters a stub that stores an FXSAVE image and halts. So registers, flags, error code, x87 and SSE state come
from the guest itself, on kernels too whose KVM_GET_FPU does not show what a guest left.

The GDT has the selectors that Linux gives its processes (and the kernel's, which ring 3 may not load), so that segment
instructions can be compared. Source: arch/x86/include/asm/segment.h for the numbers.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import threading
from typing import Any

from kvmapi.abi import ioctls
from kvmapi.abi import kvm as k
from kvmapi.abi.run import kvm_run
from kvmapi.abi.vcpu import kvm_regs, kvm_segment, kvm_sregs
from kvmapi.host import Host
from tests.conformance.snippets import Machine
from tests.differential.traced import AREAS, CODE, TIMEOUT

HIGH = 0xFFFF800000000000
PML4, PDPT, PDPT_HIGH, PD, PD_HIGH, PT, GDT, IDT, TSS, STUBS, IMAGES, RING0_STACK = (0x1000 * n for n in range(1, 13))
AREAS_AT = 0x20000
KERNEL_CS, KERNEL_SS, CS32, USER_SS, CS64 = 0x10, 0x18, 0x23, 0x2B, 0x33
_GDT = {
    1: 0x00CF9B000000FFFF, 2: 0x00AF9B000000FFFF, 3: 0x00CF93000000FFFF, 4: 0x00CFFB000000FFFF, 5: 0x00CFF3000000FFFF,
    6: 0x00AFFB000000FFFF,
}  # fmt: skip
GDT_LIMIT = 0x7F
_STUB = 32
_WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17))
PATIENCE = 0.25  # seconds; a snippet that takes longer is kicked
OTHER_EXIT = -10  # minus the exit's number: an outcome that is no vector


class Ringed(Machine):
    """The guest. `areas[address]` are writable views, as the traced child's are; `regs` is what a run begins with."""

    def __init__(self, host: Host, ring: int = 3) -> None:
        super().__init__(host, 0)
        self.ring = ring
        self._tables()
        self._stubs()
        vcpu = self.add_vcpu()
        self.fd = vcpu.fd
        self._sregs = self._ring0(vcpu.get_sregs())
        self.fs_base = self.gs_base = 0
        self.code32 = False
        self.now = kvm_regs()
        self.left = kvm_sregs()
        self._run: Any = getattr(host, "runner", lambda fd: lambda: host.ioctl(fd, ioctls.KVM_RUN))(vcpu.fd)
        self.bind()
        self._timer = Watchdog(vcpu.run_map, signals=host.name == "kernel")
        self.closing.append(self._timer)

    def __exit__(self, *arguments: object) -> None:
        for view in self.areas.values():
            view.release()
        super().__exit__(*arguments)

    def bind(self) -> None:
        """`now` is another struct."""
        self._addresses = (ctypes.addressof(self.now), ctypes.addressof(self._sregs), ctypes.addressof(self.left))

    # ---- what is in memory
    def _tables(self) -> None:
        self.put(PML4, struct.pack("<Q", PDPT | 7))
        self.put(PML4 + 8 * 256, struct.pack("<Q", PDPT_HIGH | 3))
        self.put(PDPT, struct.pack("<Q", PD | 7))
        self.put(PDPT_HIGH, struct.pack("<Q", PD_HIGH | 3))
        self.put(PD_HIGH, struct.pack("<Q", 0x83))
        self.put(PD + 8 * (CODE >> 21), struct.pack("<Q", PT | 7))
        self.areas: dict[int, memoryview] = {}
        at = AREAS_AT
        for address, size, prot in AREAS:
            for offset in range(0, size, 0x1000):
                entry = at + offset | 5 | (2 if prot & 2 else 0) | (0 if prot & 4 else 1 << 63)
                self.put(PT + 8 * (address + offset >> 12 & 511), struct.pack("<Q", entry))
            self.areas[address] = memoryview(self.memory)[at : at + size]
            at += size
        for number, descriptor in _GDT.items():
            self.put(GDT + 8 * number, struct.pack("<Q", descriptor))
        base = HIGH + TSS
        self.put(GDT + 0x40, struct.pack("<QQ", 0x67 | (base & 0xFFFFFF) << 16 | 0x8B << 40 | (base >> 24 & 0xFF) << 56, base >> 32))
        self.put(TSS + 0x66, b"\x68\0")  # no I/O permission bitmap
        self.put(TSS + 4, struct.pack("<Q", HIGH + RING0_STACK + 0x1000))

    def _stubs(self) -> None:
        def image(opcode: bytes, at: int, offset: int) -> bytes:
            return opcode + struct.pack("<i", IMAGES + offset - (at + len(opcode) + 4))

        for vector in range(32):
            at, entry = STUBS + _STUB * vector, HIGH + STUBS + _STUB * vector
            kind = 0xEE00 if vector in (3, 4) else 0x8E00
            # Ring 0 takes its frames on a stack of their own too (IST 1): the snippet's may be anything.
            gate = struct.pack("<HHHHII", entry & 0xFFFF, KERNEL_CS, kind | 1, entry >> 16 & 0xFFFF, entry >> 32, 0)
            self.put(IDT + 16 * vector, gate)
            self.put(at, image(b"\x48\x0f\xae\x05", at, 0x200) + b"\xf4")  # fxsave64 [rip+..]; hlt
        self.put(TSS + 0x24, struct.pack("<Q", HIGH + RING0_STACK + 0x1000))
        self.entry = STUBS + _STUB * 32
        self.put(self.entry, image(b"\x48\x0f\xae\x0d", self.entry, 0) + b"\x48\xcf")  # fxrstor64 [rip+..]; iretq

    def _ring0(self, sregs: kvm_sregs) -> kvm_sregs:
        sregs.cs = segment(KERNEL_CS, 0xB, 0, long=1)
        sregs.ss = segment(KERNEL_SS, 3, 0)
        sregs.ds, sregs.es = segment(USER_SS, 3, 3), segment(USER_SS, 3, 3)
        sregs.fs, sregs.gs = segment(0, 3, 3), segment(0, 3, 3)
        sregs.tr = kvm_segment(base=HIGH + TSS, limit=0x67, selector=0x40, type=0xB, present=1)
        sregs.ldt = kvm_segment(unusable=1)
        sregs.gdt.base, sregs.gdt.limit = HIGH + GDT, GDT_LIMIT
        sregs.idt.base, sregs.idt.limit = HIGH + IDT, 32 * 16 - 1
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer = 0x80010033, 0, PML4, 0x10620, 0xD01
        return sregs

    # ---- running
    def run_snippet(self, rip: int, rsp: int, flags: int, image: bytes) -> tuple[int, int, int]:
        """Run from `now` (general registers), these, and an FXSAVE image: (vector or outcome, error code, CR2). `now`
        is then what the snippet left, with RIP, RSP and RFLAGS of the frame.
        """
        sregs, host, fd = self._sregs, self.host, self.fd
        regs_at, sregs_at, left_at = self._addresses
        sregs.cr2 = 0
        sregs.fs.base, sregs.gs.base = self.fs_base, self.gs_base
        self.memory[IMAGES : IMAGES + 512] = image
        user = self.ring == 3
        cs = (CS32 if self.code32 else CS64) if user else KERNEL_CS
        frame = RING0_STACK + 0x800
        self.memory[frame : frame + 40] = struct.pack("<5Q", rip, cs, flags, rsp, USER_SS if user else KERNEL_SS)
        self.now.rip, self.now.rsp, self.now.rflags = HIGH + self.entry, HIGH + frame, 2
        host.ioctl(fd, ioctls.KVM_SET_SREGS, sregs_at)
        host.ioctl(fd, ioctls.KVM_SET_REGS, regs_at)
        self._timer.begin()
        try:
            result = self._run()
        except OSError:
            result = -1
        self._timer.end()
        host.ioctl(fd, ioctls.KVM_GET_REGS, regs_at)
        host.ioctl(fd, ioctls.KVM_GET_SREGS, left_at)
        if result < 0:
            return TIMEOUT, 0, 0
        return self._outcome()

    def _outcome(self) -> tuple[int, int, int]:
        now, reason = self.now, struct.unpack_from("<I", self.vcpus[0].run_map, kvm_run.exit_reason.offset)[0]
        vector, at = divmod(now.rip - HIGH - STUBS, _STUB)
        if reason != k.KVM_EXIT_HLT or not 0 <= vector < 32 or at != 9:
            return OTHER_EXIT - reason, 0, 0
        words = list(struct.unpack_from("<6Q", self.memory, now.rsp - HIGH))
        error = words.pop(0) if vector in _WITH_ERROR else 0
        now.rip, self.cs, now.rflags, now.rsp, self.ss = words[:5]
        return vector, error, self.left.cr2

    def image(self) -> bytes:
        """The FXSAVE image that the snippet left."""
        return self.memory[IMAGES + 0x200 : IMAGES + 0x400]


def segment(selector: int, kind: int, dpl: int, *, long: int = 0) -> kvm_segment:
    """A flat segment."""
    return kvm_segment(base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, s=1, l=long, db=1 - long, g=1, dpl=dpl)


class Watchdog:
    """Ends a KVM_RUN that takes too long, by immediate_exit. One thread for all runs: `begin` and `end` are cheap. A
    kernel's vCPU needs a signal as well (`signals`), which goes to the thread that made this object.
    """

    def __init__(self, run_map: Any, patience: float = PATIENCE, *, signals: bool = False) -> None:
        self._map = run_map
        self._patience = patience
        self._whom = threading.get_ident() if signals else 0
        if signals:
            self._before = signal.signal(signal.SIGUSR1, lambda *_: None)
        self._runs = 0
        self._inside = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """A run starts."""
        self._runs += 1
        self._inside = True

    def end(self) -> None:
        """It is over."""
        self._inside = False
        self._map[_IMMEDIATE_EXIT] = 0

    def _watch(self) -> None:
        seen = -1
        while not self._stop.wait(self._patience / 2):
            if self._inside and self._runs == seen:
                self._map[_IMMEDIATE_EXIT] = 1
                if self._whom:
                    signal.pthread_kill(self._whom, signal.SIGUSR1)
            seen = self._runs

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
        if self._whom:
            signal.signal(signal.SIGUSR1, self._before)


_IMMEDIATE_EXIT = kvm_run.immediate_exit.offset
