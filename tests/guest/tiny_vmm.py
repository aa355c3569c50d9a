"""Test support: the smallest VMM that boots a bundled guest, on the kernel's KVM alone.

It knows nothing of vmm or kvmapi, so that the guests are judged by a second, independent reading of docs/seams.md
section 4. One function, `run`, one VM per call: a plain one, or (`protected=True`) a KVM_X86_SW_PROTECTED_VM whose test
area is backed by a guest_memfd, or by none (`lazy_private=True`).
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from boot_image import (
    BOOT_INFO,
    FEATURE_HYPERCALL,
    FEATURE_MMIO,
    FEATURE_MSR,
    MEMORY,
    MMIO,
    PLAIN,
    PML4,
    SW_PROTECTED,
    TEST_AREA,
    TEST_SIZE,
    prepare,
    stack_top,
)

CREATE_VM, VCPU_MMAP_SIZE, CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
SET_MEMORY2, CREATE_GUEST_MEMFD, SET_ATTRIBUTES, ENABLE_CAP = 0x40A0AE49, 0xC040AED4, 0x4020AED2, 0x4068AEA3
SET_MEMORY, GET_CPUID, SET_CPUID2 = 0x4020AE46, 0xC008AE05, 0x4008AE90
GET_SREGS, SET_SREGS, SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
CAP_USER_SPACE_MSR, CAP_EXIT_HYPERCALL = 188, 201
EXITS = {2: "IO", 3: "HYPERCALL", 5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 17: "INTERNAL_ERROR", 29: "RDMSR", 30: "WRMSR"}
EXITS |= {9: "FAIL_ENTRY", 39: "MEMORY_FAULT"}


@dataclass
class Result:
    """`end` is "exit", "timeout" or the name of the exit that ended the run."""

    console: str = ""
    code: int | None = None
    end: str = ""
    exits: collections.Counter[str] = field(default_factory=collections.Counter)
    conversions: list[tuple[int, int, bool]] = field(default_factory=list)
    memory: bytes = b""


def run(
    elf: Path,
    arguments: str = "",
    *,
    features: int = FEATURE_MMIO,
    vcpus: int = 1,
    protected: bool = False,
    lazy_private: bool = False,
    timeout: float = 10.0,
    on_stage: Callable[[int, mmap.mmap], None] = lambda stage, memory: None,
) -> Result:
    """Boots `elf` and runs it to its end. Call it in the main thread: the timeout is a signal."""
    machine = _Machine(features, protected, lazy_private, on_stage)
    try:
        return machine.run(elf, arguments, vcpus, timeout)
    finally:
        machine.close()


class _Machine:
    def __init__(self, features: int, protected: bool, lazy: bool, on_stage: Callable[[int, mmap.mmap], None]) -> None:
        self.features, self.protected, self.lazy, self.on_stage = features, protected, lazy, on_stage
        self.result = Result()
        self.fds: list[int] = []
        self.echo = 0
        self.registers = bytearray(64)
        self.msr = 0
        self.stop = False
        self.kvm = self._keep(os.open("/dev/kvm", os.O_RDWR))
        self.vm = self._keep(fcntl.ioctl(self.kvm, CREATE_VM, SW_PROTECTED if protected else PLAIN))
        self.memory = mmap.mmap(-1, MEMORY)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        if protected:
            self._slots_with_guest_memfd(hva)
        else:
            fcntl.ioctl(self.vm, SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, MEMORY, hva))
        for wanted, capability, value in (
            (FEATURE_MSR, CAP_USER_SPACE_MSR, 2), (FEATURE_HYPERCALL, CAP_EXIT_HYPERCALL, 1 << 12)
        ):  # fmt: skip
            if features & wanted:
                fcntl.ioctl(self.vm, ENABLE_CAP, struct.pack("<IIQ88x", capability, 0, value))

    def _keep(self, fd: int) -> int:
        self.fds.append(fd)
        return fd

    def close(self) -> None:
        for fd in reversed(self.fds):
            os.close(fd)

    def _slots_with_guest_memfd(self, hva: int) -> None:
        end = TEST_AREA + TEST_SIZE
        for slot, (gpa, size) in enumerate(((0, TEST_AREA), (TEST_AREA, TEST_SIZE), (end, MEMORY - end))):
            flags, guest_memfd = 0, 0
            if gpa == TEST_AREA and not self.lazy:
                argument = bytearray(struct.pack("<QQ48x", size, 0))
                flags, guest_memfd = 4, self._keep(fcntl.ioctl(self.vm, CREATE_GUEST_MEMFD, argument))
            fcntl.ioctl(self.vm, SET_MEMORY2, struct.pack(
                "<IIQQQQI116x", slot, flags, gpa, size, hva + gpa, 0, guest_memfd))  # fmt: skip
        if self.lazy:
            self._attributes(TEST_AREA, TEST_SIZE, True)

    def _attributes(self, gpa: int, size: int, private: bool) -> None:
        fcntl.ioctl(self.vm, SET_ATTRIBUTES, struct.pack("<QQQQ", gpa, size, 8 if private else 0, 0))

    def run(self, elf: Path, arguments: str, vcpus: int, timeout: float) -> Result:
        kind = SW_PROTECTED if self.protected else PLAIN
        entry = prepare(self.memory, elf, arguments, vm_type=kind, features=self.features, vcpus=vcpus)
        prepared = [self._vcpu(index, entry) for index in range(vcpus)]
        threads = [threading.Thread(target=self._loop, args=(index, *prepared[index])) for index in range(1, vcpus)]
        for thread in threads:
            thread.start()
        old = signal.signal(signal.SIGALRM, self._alarm)
        signal.setitimer(signal.ITIMER_REAL, timeout, 0.1)  # again and again: the first may miss KVM_RUN
        try:
            self._loop(0, *prepared[0])
        except TimeoutError:
            self.result.end = "timeout"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.stop = True
            for thread, (_, state) in zip(threads, prepared[1:]):
                state[1] = 1  # immediate_exit, looked at on entry; the signal brings a running vCPU back to it
                while thread.is_alive() and thread.ident:
                    signal.pthread_kill(thread.ident, signal.SIGALRM)
                    thread.join(0.01)
            signal.signal(signal.SIGALRM, old)
        self.result.memory = self.memory[:]
        return self.result

    def _alarm(self, *_: object) -> None:
        if not self.stop:
            raise TimeoutError

    def _vcpu(self, index: int, entry: int) -> tuple[int, mmap.mmap]:
        fd = self._keep(fcntl.ioctl(self.vm, CREATE_VCPU, index))
        state = mmap.mmap(fd, fcntl.ioctl(self.kvm, VCPU_MMAP_SIZE))
        cpuid = bytearray(struct.pack("<II", 200, 0) + bytes(40 * 200))
        fcntl.ioctl(self.kvm, GET_CPUID, cpuid)
        fcntl.ioctl(fd, SET_CPUID2, cpuid)
        sregs = bytearray(312)
        fcntl.ioctl(fd, GET_SREGS, sregs)
        code = struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
        data = struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        tss = struct.pack("<QIHBBBBBBBBBB", 0xC0000 + 128 * index, 0x67, 0x18 + 16 * index, 11, 1, *[0] * 8)
        sregs[:168] = code + data * 5 + tss
        sregs[192:224] = struct.pack("<QH6xQH6x", 0x1000, 0x18 + 16 * 64 - 1, 0x2000, 0xFFF)
        sregs[224:272] = struct.pack("<6Q", 0x80010033, 0, PML4, 0x620, 0, 0xD01)
        fcntl.ioctl(fd, SET_SREGS, bytes(sregs))
        # rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags
        fcntl.ioctl(fd, SET_REGS, struct.pack("<18Q", *[0] * 4, index, BOOT_INFO, stack_top(index) - 8, *[0] * 9, entry, 2))
        return fd, state

    def _loop(self, index: int, fd: int, state: mmap.mmap) -> None:
        while not self.stop:
            try:
                fcntl.ioctl(fd, KVM_RUN, 0)
            except InterruptedError:
                continue
            except OSError:
                if struct.unpack_from("<I", state, 8)[0] != 39:
                    raise
            reason = struct.unpack_from("<I", state, 8)[0]
            name = EXITS.get(reason, str(reason))
            self.result.exits[name] += 1
            handler = getattr(self, "_" + name.lower(), None)
            if handler is None:
                if index == 0 or name != "HLT":
                    self.result.end, self.stop = name, True
                return
            handler(state)

    def _io(self, state: mmap.mmap) -> None:
        out, size, port, count, at = struct.unpack_from("<BBHIQ", state, 32)
        if not out:
            letters = bytes(65 + i for i in range(count))
            value = 0x60 if port == 0x3FD else (self.echo + 1) % (1 << 8 * size)
            state[at : at + size * count] = letters if count > 1 else value.to_bytes(size, "little")
            return
        value = int.from_bytes(state[at : at + size], "little")
        if port == 0x3F8:
            self.result.console += state[at : at + count].decode("latin-1")
        elif port == 0xF8:
            self.echo = value
        elif port == 0xF9:
            self.on_stage(value, self.memory)
        elif port == 0xF4:
            self.result.code, self.result.end, self.stop = value & 0xFF, "exit", True

    def _mmio(self, state: mmap.mmap) -> None:
        gpa, data, size, write = struct.unpack_from("<Q8sIB", state, 32)
        at = gpa - MMIO
        if write:
            self.registers[at : at + size] = data[:size]
        else:
            state[40 : 40 + size] = bytes(self.registers[at : at + size])

    def _rdmsr(self, state: mmap.mmap) -> None:
        struct.pack_into("<Q", state, 48, (self.msr + 1) & (1 << 64) - 1)

    def _wrmsr(self, state: mmap.mmap) -> None:
        self.msr = struct.unpack_from("<Q", state, 48)[0]

    def _hypercall(self, state: mmap.mmap) -> None:
        gpa, pages, attributes = struct.unpack_from("<QQQ", state, 40)
        self._convert(gpa, pages << 12, bool(attributes & 16))
        struct.pack_into("<Q", state, 88, 0)

    def _memory_fault(self, state: mmap.mmap) -> None:
        flags, gpa, size = struct.unpack_from("<QQQ", state, 32)
        # A private fault means the attribute says private; there is no guest_memfd, so it becomes shared.
        self._convert(gpa, size, bool(not flags & 8))

    def _convert(self, gpa: int, size: int, private: bool) -> None:
        self.result.conversions.append((gpa, size, private))
        if self.protected:
            self._attributes(gpa, size, private)
