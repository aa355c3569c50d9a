"""Test support: an SEV-ES guest on the tiny engine, and a host that it asks through its GHCB.

A second reading of the protocol, written against the kernel's svm/sev.c and not against the project's model: the guest's
handler is right when both hosts understand it. Each instruction that KVM intercepts raises #VC, which the engine delivers by
hand; VMGEXIT goes to `_vmgexit`. The host sees the GHCB page through the shared backing, and no register.

`answers` lets a test be a host that lies: a function by exit code that is called instead of the honest one.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boot_image import FEATURE_HYPERCALL, FEATURE_MMIO, FEATURE_MSR, MMIO, MSR, PML4, SEV_ES, prepare, stack_top
from tiny_engine import EINVAL, Engine, uc
from tiny_vmm import Result
from unicorn import x86_const as x86

MNEMONICS = {
    **dict.fromkeys(("in", "out", "insb", "insw", "insl", "outsb", "outsw", "outsl"), 0x7B),
    "cpuid": 0x72, "rdmsr": 0x7C, "wrmsr": 0x7C, "vmmcall": 0x81,
    "rdtscp": 0x87, "rdpmc": 0x6F, "wbinvd": 0x89, "monitor": 0x8A, "mwait": 0x8B, "rdtsc": 0x6E,
}  # fmt: skip
"""What raises #VC with which exit code; this host intercepts RDTSC and RDTSCP too."""

PLACES = {
    "cpl": 0xCB, "rax": 0x1F8, "rcx": 0x308, "rdx": 0x310, "rbx": 0x318, "code": 0x390, "info_1": 0x398,
    "info_2": 0x3A0, "scratch": 0x3A8, "xcr0": 0x3E8,
}  # fmt: skip
VALID, BUFFER = 0x3F0, 0x800
REQUIRED = {0x72: "rax rcx", 0x81: "rax cpl", 0x6F: "rcx", 0x8A: "rax rcx rdx", 0x8B: "rax rcx"}
GP, UD = 0x8000030D, 0x80000306
GHCB_MSR, C_BIT = 0xC0010130, 51
Answer = Callable[["EsEngine"], None]


class EsEngine(Engine):
    """One SEV-ES vCPU and its host. `msr`: the GHCB MSR; `seen`: (exit code, info_1, info_2) of every question, in order;
    `strings`: what came by string OUT.
    """

    def __init__(self, versions: tuple[int, int] = (1, 2), index: int = 0) -> None:
        super().__init__(SEV_ES)
        self.versions, self.index = versions, index
        self.msr = versions[1] << 48 | versions[0] << 32 | C_BIT << 24 | 1
        self.seen: list[tuple[int, int, int]] = []
        self.msr_questions: list[int] = []
        self.strings = b""
        self.answers: dict[int, Answer] = {}
        self.registers = bytearray(64)
        self.echo = self.letters = self.served = self.jump_table = 0
        self.terminated: int | None = None
        self.given, self.out = bytes(16), dict[str, int]()
        self._also: dict[int, int] = {}
        self._pending: int | None = None
        self._hole = False

    def run(
        self, elf: Path, arguments: str = "", *, also: dict[int, int] | None = None, vm_type: int = SEV_ES, magic: bool = True
    ) -> Result:
        """To the exit port or a termination (`end` is "terminate").

        `also`: addresses where #VC comes once, with its exit code; `vm_type`: what the boot info says; `magic`: whether it is one.
        """
        features = FEATURE_HYPERCALL | FEATURE_MMIO | FEATURE_MSR
        rip = prepare(self.tables, elf, arguments, vm_type=SEV_ES, features=features, vcpus=self.index + 1, c_mask=self.c_mask)
        self.private[0x4008:0x4010] = struct.pack("<Q", vm_type)
        if not magic:
            self.private[0x4000] = 0
        self._start()
        self._also = dict(also or {})
        for address in self._also:
            self.cpu.hook_add(uc.UC_HOOK_CODE, self._by_the_host, None, address, address)
        self._intercept(elf)
        while not self.result.end:
            self._pending, self._hole = None, False
            try:
                self.cpu.emu_start(rip, 0xFFFF_FFFF_FFFF_F000)
            except uc.UcError:
                halted = self.private[self.cpu.reg_read(x86.UC_X86_REG_RIP) - 1] == 0xF4  # an error where no handler waits for it
                if self._pending is None and not self._hole and not halted:
                    raise
                if self._pending is None and self._hole:
                    self._pending = 0x400
            rip = self.cpu.reg_read(x86.UC_X86_REG_RIP)
            if self._pending is None:
                self.result.end = "HLT"
            elif self._pending < 0:
                self._host()
                rip += 4
            else:
                rip = self._deliver(rip, self._pending)
        return self.result

    def _start(self) -> None:
        cpu = self.cpu
        for register, value in (
            (x86.UC_X86_REG_CR4, 0x620), (x86.UC_X86_REG_CR3, PML4 | self.c_mask), (x86.UC_X86_REG_CR0, 0x80010033),
            (x86.UC_X86_REG_RDI, 0x4000), (x86.UC_X86_REG_RSI, self.index), (x86.UC_X86_REG_RSP, stack_top(self.index) - 8),
            (x86.UC_X86_REG_GDTR, (0, 0x1000, 0x17 + 16 * (self.index + 1), 0)),
            (x86.UC_X86_REG_TR, (0x18 + 16 * self.index, 0xC0000 + 128 * self.index, 0x67, 0x8B00)),
        ):  # fmt: skip
            if register == x86.UC_X86_REG_CR0:
                cpu.msr_write(0xC0000080, 0xD01)
            cpu.reg_write(register, value)

    def _intercept(self, elf: Path) -> None:
        """A hook at each instruction that is intercepted; the disassembler knows where they begin."""
        text = subprocess.run(["objdump", "-d", str(elf)], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}).stdout
        pattern = re.compile(r"^\s+([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*(?:repz |rep )?([a-z]+)", re.M)
        for address, code, name in pattern.findall(text):
            where = int(address, 16)
            if code.strip() == "f3 0f 01 d9":  # not every disassembler knows its name
                self.cpu.hook_add(uc.UC_HOOK_CODE, self._hit, None, where, where)
            elif name in MNEMONICS:
                self.cpu.hook_add(uc.UC_HOOK_CODE, self._hit, MNEMONICS[name], where, where)

    def _hit(self, cpu: Any, address: int, size: int, code: int | None) -> None:
        if self._pending is not None:
            return
        if code == 0x7C and cpu.reg_read(x86.UC_X86_REG_RCX) == GHCB_MSR:  # not intercepted: done here, as the CPU would
            low, high = x86.UC_X86_REG_RAX, x86.UC_X86_REG_RDX
            if self.private[address + 1] == 0x30:
                self.msr = cpu.reg_read(high) << 32 | cpu.reg_read(low)
            else:
                cpu.reg_write(low, self.msr & 0xFFFFFFFF)
                cpu.reg_write(high, self.msr >> 32)
            cpu.reg_write(x86.UC_X86_REG_RIP, address + 2)
            return
        self._pending = -1 if code is None else code
        cpu.reg_write(x86.UC_X86_REG_RIP, address)  # or it would be executed before the engine stops
        cpu.emu_stop()

    def _by_the_host(self, cpu: Any, address: int, size: int, data: object) -> None:
        code = self._also.pop(address, None)
        if code is not None:
            self._hit(cpu, address, size, code)

    def _fill(self, cpu: object, address: int, access: int, entry: Any, data: object) -> bool:
        if address & ~0x1FFFFF == MMIO:
            self._hole = True
            return False
        return super()._fill(cpu, address, access, entry, data)

    def _deliver(self, rip: int, code: int) -> int:
        """#VC as the CPU delivers it through an interrupt gate of the same ring; the address of its handler."""
        cpu = self.cpu
        names = (x86.UC_X86_REG_SS, x86.UC_X86_REG_RSP, x86.UC_X86_REG_RFLAGS, x86.UC_X86_REG_CS)
        ss, rsp, flags, cs = (cpu.reg_read(name) for name in names)
        top = (rsp & ~15) - 48
        self.private[top : top + 48] = struct.pack("<6Q", code, rip, cs or 8, flags, rsp, ss or 0x10)
        cpu.reg_write(x86.UC_X86_REG_RSP, top)
        low, high = struct.unpack_from("<QQ", self.private, 0x2000 + 16 * 29)
        return low & 0xFFFF | low >> 32 & 0xFFFF0000 | high << 32

    # ---- the host

    def get(self, name: str) -> int:
        """A field of the page, whether valid or not."""
        at = self.msr + PLACES[name]
        return self.shared[at] if name == "cpl" else int.from_bytes(self.shared[at : at + 8], "little")

    def valid(self, name: str) -> bool:
        """Whether the guest gave this field."""
        bit = PLACES[name] // 8
        return bool(self.given[bit // 8] >> bit % 8 & 1)

    def put(self, name: str, value: int) -> None:
        """Set a field and mark it as valid."""
        at, bit = self.msr + PLACES[name], PLACES[name] // 8
        self.shared[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
        self.shared[self.msr + VALID + bit // 8] |= 1 << bit % 8

    def done(self, info_1: int = 0, info_2: int = 0) -> None:
        """The answer's two words."""
        self.put("info_1", info_1)
        self.put("info_2", info_2)

    def _host(self) -> None:
        if self.msr & 0xFFF:
            self._msr_protocol()
            return
        at = self.msr + VALID
        self.given = bytes(self.shared[at : at + 16])
        self.shared[at : at + 16] = bytes(16)
        code, info_1, info_2 = (self.get(name) for name in ("code", "info_1", "info_2"))
        self.seen.append((code, info_1, info_2))
        assert all(self.valid(name) for name in ("code", "info_1", "info_2"))
        assert int.from_bytes(self.shared[self.msr + 0xFFA : self.msr + 0x1000], "little") == min(2, self.versions[1])
        known = {name: self.get(name) if self.valid(name) else 0 for name in ("rax", "rbx", "rcx", "rdx")}
        assert all(self.valid(name) for name in REQUIRED.get(code, "").split()), f"{code:#x}: too little was given"
        self.done()
        self.out = known
        honest = getattr(self, f"_on_{code:x}", None)
        answer = self.answers.get(code)
        if answer is not None:
            answer(self)
        elif honest is not None:
            honest(info_1, info_2)
        else:
            self.done(2, 6)
        for name, value in self.out.items():
            self.put(name, value)

    def _msr_protocol(self) -> None:
        info = self.msr & 0xFFF
        self.msr_questions.append(info)
        if info in self.answers:
            self.answers[info](self)
        elif info == 2:
            self.msr = self.versions[1] << 48 | self.versions[0] << 32 | C_BIT << 24 | 1
        elif info == 4:
            self.msr = self.cpuid(self.msr >> 32)[self.msr >> 30 & 3] << 32 | 5
        elif info == 6:
            self.msr = 1 << 12 | 7
        elif info == 0x80:
            self.msr = 3 << 12 | 0x81
        elif info == 0x100:
            self.terminated, self.result.end = self.msr, "terminate"

    @staticmethod
    def cpuid(leaf: int) -> tuple[int, int, int, int]:
        """Something that depends on the leaf; of leaf 0 a vendor."""
        if leaf == 0:
            return 0xD, *struct.unpack("<3I", b"TinyHostofES")
        return tuple((leaf + at) * 0x9E3779B9 & 0x7FFFFFFF for at in range(4))  # type: ignore[return-value]

    def _on_72(self, info_1: int, info_2: int) -> None:
        if self.out["rax"] == 0xD and not self.valid("xcr0"):
            self.done(2, 4)
            return
        self.out = dict(zip(("rax", "rbx", "rcx", "rdx"), self.cpuid(self.out["rax"] & 0xFFFFFFFF)))

    def _on_6e(self, info_1: int, info_2: int) -> None:
        self.out |= {"rax": 0x11, "rdx": 0x22}

    def _on_87(self, info_1: int, info_2: int) -> None:
        self.out |= {"rax": 0x33, "rdx": 0x44, "rcx": 0x55}

    def _on_7c(self, info_1: int, info_2: int) -> None:
        self.result.exits["WRMSR" if info_1 else "RDMSR"] += 1
        if self.out["rcx"] != MSR:
            self.done(1, GP)
        elif info_1:
            assert self.valid("rax") and self.valid("rdx")
            self.served = self.out["rdx"] << 32 | self.out["rax"]
        else:
            self.out |= {"rax": self.served + 1 & 0xFFFFFFFF, "rdx": self.served + 1 >> 32}

    def _on_81(self, info_1: int, info_2: int) -> None:
        number, gpa, pages, attributes = (self.out[name] for name in ("rax", "rbx", "rcx", "rdx"))
        answer = -1000
        if number == 12:
            answer = -EINVAL if gpa % 4096 or not pages or (gpa >> 12) + pages >= 1 << 64 else 0
        if answer == 0:
            self.result.exits["HYPERCALL"] += 1
            self._convert(gpa, pages, bool(attributes & 16))
        self.out["rax"] = answer

    def _on_7b(self, info_1: int, count: int) -> None:
        size, port, into = info_1 >> 4 & 7, info_1 >> 16, bool(info_1 & 1)
        self.result.exits["IO"] += 1
        if not info_1 & 4:
            if into:
                self.out["rax"] = self.read_port(port, size)
            else:
                assert self.valid("rax")
                self._out(None, port, size, self.out["rax"], None)
            return
        scratch, page = self.get("scratch"), self.msr
        assert self.valid("scratch") and page + BUFFER <= scratch and scratch + count * size <= page + 0xFF0
        for at in range(scratch, scratch + count * size, size):
            if into:
                self.shared[at : at + size] = self.read_string(port, size)
            else:
                self.strings += self.shared[at : at + size]
                self._out(None, port, size, int.from_bytes(self.shared[at : at + size], "little"), None)

    def _out(self, cpu: object, port: int, size: int, value: int, data: object) -> None:
        if port == 0xF8:
            self.echo = value & (1 << 8 * size) - 1
        super()._out(cpu, port, size, value, data)
        self.result.exits["IO"] -= 1  # counted by whoever called

    def read_port(self, port: int, size: int) -> int:
        """IN of one item; the bits above it are noise, which the guest must not take over."""
        value = self.echo + 1 if port == 0xF8 else -1
        return value & (1 << 8 * size) - 1 | 0xA5A5A5A5_00000000 | (0 if size == 4 else 0xA5A50000)

    def read_string(self, port: int, size: int) -> bytes:
        """One item of INS: letters."""
        self.letters += 1
        return bytes([0x41 + (self.letters - 1) % 26]) * size

    def _on_80000001(self, gpa: int, size: int) -> None:
        self.result.exits["MMIO"] += 1
        at = self.get("scratch")
        assert self.valid("scratch") and gpa >= MMIO and size <= 8
        self.shared[at : at + 8] = b"\xa5" * 8
        self.shared[at : at + size] = self.registers[gpa - MMIO : gpa - MMIO + size]

    def _on_80000002(self, gpa: int, size: int) -> None:
        self.result.exits["MMIO"] += 1
        at = self.get("scratch")
        assert self.valid("scratch") and gpa >= MMIO and size <= 8
        self.registers[gpa - MMIO : gpa - MMIO + size] = self.shared[at : at + size]

    def _on_80000003(self, info_1: int, info_2: int) -> None:
        pass

    def _on_80000004(self, info_1: int, info_2: int) -> None:
        self.done(0, 1)  # as if a SIPI came at once

    def _on_80000005(self, info_1: int, info_2: int) -> None:
        if info_1:
            self.done(0, self.jump_table)
        else:
            self.jump_table = info_2

    def _on_8000fffd(self, info_1: int, info_2: int) -> None:
        self.done(0, 3)
