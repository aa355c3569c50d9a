"""The instructions that leave the engine, executed here: port I/O, HLT, MSRs, CPUID and the time-stamp counter.

Others are in strings.py, control.py, syscalls.py and hazards.py; `execute` finds them all.

An instruction that needs the VMM writes its exit and leaves `pending`: the rest of the instruction, run at the next
KVM_RUN. RIP moves past the instruction only then, as in KVM, so that user space sees the address of the instruction
it emulates; an OUT is skipped only if user space left RIP alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.cpu import control, hazards, layout, ports, runtime_cpuid, syscalls
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.msrs import TSC_AUX, NoSuchMsr
from kvmapi.model.cpu.scan import WATCHED, Site
from kvmapi.model.cpu.state import RAX, RBX, RCX, RDX
from kvmapi.model.cpu.strings import StringIo
from kvmapi.model.mem.physical import Refused
from kvmapi.model.runpage import PIO_OFFSET
from kvmapi.model.stats import HALT_EXITS

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.policy import ExitPolicy

_GP = 13
HALTED = 1 << 21  # no result of KVM_RUN: the vCPU sleeps in it
_U64 = 0xFFFFFFFFFFFFFFFF
_EXIT_IO_OUT = kvm.KVM_EXIT_IO_OUT
_MASKS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}
_CR4_TSD = 1 << 2
_ODD_PORT = 0x7E  # the only one at whose OUT user space finds RIP behind the instruction
_RIP, _HFLAGS = layout.EIP >> 3, layout.HFLAGS >> 2  # indices for the hot path
_CPL, _KEEP = layout.HF_CPL, layout.HF_KEEP


def _reason(why: NoSuchMsr) -> int:
    return kvm.KVM_MSR_EXIT_REASON_INVAL if why.known else kvm.KVM_MSR_EXIT_REASON_UNKNOWN


class Privileged:
    """Executes sensitive instructions of one Cpu. Each method returns KVM_RUN's result, or None when the guest goes
    on.
    """

    def __init__(self, cpu: Cpu, policy: ExitPolicy) -> None:
        self._policy = policy
        self._cpu = cpu
        self._registers = cpu.registers
        self._page = cpu.page
        self.pending: Callable[[], int | None] | None = None  # None: go on; else another exit was written
        self._finish_out = self._out_done
        self._words, self._modes = cpu.registers.u64, cpu.registers.u32
        self._out_rip = self._out_length = 0  # of an OUT that is done once user space comes back
        self._site = Site("none", 0)
        strings = StringIo(self, cpu, policy)
        self._kinds: dict[str, Callable[[Site], int | None]] = {
            "out": self._out,
            "in": self._in,
            "outs": strings.outs,
            "ins": strings.ins,
            "hlt": self._hlt,
            "rdmsr": self._rdmsr,
            "wrmsr": self._wrmsr,
            "cpuid": self._cpuid,
            **dict.fromkeys(("rdtsc", "rdtscp"), self._rdtsc),
            **{kind: functools.partial(execute, cpu) for kind, execute in control.INSTRUCTIONS.items()},
            **dict.fromkeys(("syscall", "sysret", "sysenter", "sysexit"), self._system_call),
            **{kind: functools.partial(execute, cpu) for kind, execute in hazards.INSTRUCTIONS.items()},
            **dict.fromkeys(WATCHED, self._flags_instruction),
        }

    def replace(self, kinds: Mapping[str, Callable[[Site], int | None]]) -> None:
        """Another kind of guest: these instructions do something else in it."""
        self._kinds.update(kinds)

    def execute(self, site: Site) -> int | None:
        """One instruction found by the scan."""
        try:
            return self._kinds[site.kind](site)
        except (Fault, Refused) as why:
            return self.operand_refused(why)

    def prepared(self, site: Site) -> Callable[[], int | None]:
        """What `execute` does with it, but for a Fault or Refused of its operand."""
        return functools.partial(self._kinds[site.kind], site)

    def advance(self, length: int) -> None:
        """An instruction of so many bytes was executed."""
        registers = self._registers
        mask = _U64 if registers.long_mode else 0xFFFFFFFF
        registers.rip = registers.rip + length & mask
        if registers.u32[_HFLAGS] & _KEEP:
            self._cpu.events.leave_shadow()

    def no_privilege(self) -> int | None:
        """#GP: the code that runs may not do that."""
        return self._cpu.raise_in_guest(_GP, 0)

    def may_do_io(self, site: Site) -> bool:
        """May the code that runs use the instruction's port? Asked of code that is not in ring 0."""
        port = self._registers.gpr(RDX) & 0xFFFF if site.port is None else site.port
        return ports.allowed(self._registers, self._cpu.mmu, port, site.size)

    # ---- port I/O
    def _out(self, site: Site) -> int | None:
        if self._modes[_HFLAGS] & _CPL and not self.may_do_io(site):
            return self.no_privilege()
        words, page, size, port = self._words, self._page, site.size, site.port
        value = words[RAX] & _MASKS[size]  # REGS is at 0: the hot path
        if port is None:
            port = words[RDX] & 0xFFFF
        bus = self._policy.bus
        if bus is not None and bus.write("pio", port, value.to_bytes(size, "little")):
            self.advance(site.length)
            return None
        page.pio[size][0] = value
        if port == _ODD_PORT and self._policy.has_quirk(kvm.KVM_X86_QUIRK_OUT_7E_INC_RIP):
            self.advance(site.length)
        else:
            self._out_rip, self._out_length, self.pending = words[_RIP], site.length, self._finish_out
        return page.io(_EXIT_IO_OUT, size, port, 1)

    def _out_done(self) -> None:
        words = self._words
        if words[_RIP] == self._out_rip:
            words[_RIP] = self._out_rip + self._out_length & _U64
            if self._modes[_HFLAGS] & _KEEP:
                self._cpu.events.leave_shadow()

    def _in(self, site: Site) -> int | None:
        if self._registers.cpl and not self.may_do_io(site):
            return self.no_privilege()
        self._site = site
        port = self._registers.gpr(RDX) & 0xFFFF if site.port is None else site.port
        if self.read_kernels(port, site.size, 1):
            self._in_done()
            return None
        self.pending = self._in_done
        return self._page.io(kvm.KVM_EXIT_IO_IN, site.size, port, 1)

    def read_kernels(self, port: int, size: int, count: int) -> bool:
        """Ask KVM's own devices for what an IN reads, into the page; False where there is none at the port."""
        bus, page = self._policy.bus, self._page
        for at in range(PIO_OFFSET, PIO_OFFSET + count * size, size):
            data = bus.read("pio", port, size) if bus is not None else None
            if data is None:
                return False
            page.memory[at : at + size] = data
        return True

    def _in_done(self) -> None:
        size = self._site.size
        value = int.from_bytes(self._page.memory[PIO_OFFSET : PIO_OFFSET + size], "little")
        old = self._registers.gpr(RAX)
        self.set_gpr(RAX, value if size == 4 else old & ~((1 << 8 * size) - 1) | value)
        self.advance(self._site.length)

    def operand_refused(self, why: Fault | Refused) -> int | None:
        """What becomes of an instruction whose memory operand cannot be accessed."""
        if isinstance(why, Fault):
            return self._cpu.raise_in_guest(why.vector, why.error, why.address)
        return self._cpu.refusals.result(why)

    def _flags_instruction(self, site: Site) -> int | None:
        return self._cpu.events.flags_instruction(site)

    # ---- HLT
    def _hlt(self, site: Site) -> int | None:
        if self._registers.cpl:
            return self.no_privilege()
        self.advance(site.length)
        self._cpu.stats.counters[HALT_EXITS] += 1
        return self._page.head(kvm.KVM_EXIT_HLT) if self._cpu.lapic is None else HALTED

    # ---- system calls
    def _system_call(self, site: Site) -> None:
        syscalls.execute(self._cpu, site.kind, site.length, site.size == 8)
        self._cpu.events.leave_shadow()
        self._cpu.attention |= bool(self._cpu.watching[0])  # SYSRET may set IF

    # ---- CPUID and MSRs
    def set_gpr(self, number: int, value: int) -> None:
        """Write a general register, by the encoder's number."""
        self._registers.set_gpr(number, value & _U64)

    def _rdtsc(self, site: Site) -> int | None:
        """RDTSC and RDTSCP read what MSR 0x10 shows, and not the engine's own count."""
        registers = self._registers
        if registers.cpl and registers.cr(4) & _CR4_TSD:
            return self.no_privilege()
        value = self._cpu.msrs.tsc()
        self.set_gpr(RAX, value & 0xFFFFFFFF)
        self.set_gpr(RDX, value >> 32)
        if site.kind == "rdtscp":
            self.set_gpr(RCX, self._cpu.msrs.read(TSC_AUX, host=True))
        self.advance(site.length)
        return None

    def _cpuid(self, site: Site) -> int | None:
        registers = self._registers
        if registers.cpl and self._cpu.msrs.machine.faults_cpuid:
            return self.no_privilege()
        values = self.cpuid(registers.gpr(RAX) & 0xFFFFFFFF, registers.gpr(RCX) & 0xFFFFFFFF)
        for number, value in zip((RAX, RBX, RCX, RDX), values):
            self.set_gpr(number, value)
        self.advance(site.length)
        return None

    def cpuid(self, leaf: int, index: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX and EDX of the guest's CPUID as they are now."""
        return runtime_cpuid.read(self._cpu, leaf, index)

    def _rdmsr(self, site: Site) -> int | None:
        if self._registers.cpl:
            return self.no_privilege()
        number = self._registers.gpr(RCX) & 0xFFFFFFFF
        if self._policy.msr_filter is not None and not self._policy.msr_filter.allows(number, kvm.KVM_MSR_FILTER_READ):
            return self._msr_to_user(site, kvm.KVM_EXIT_X86_RDMSR, number, 0, kvm.KVM_MSR_EXIT_REASON_FILTER)
        try:
            value = self._cpu.msrs.read(number)
        except NoSuchMsr as why:
            return self._msr_to_user(site, kvm.KVM_EXIT_X86_RDMSR, number, 0, _reason(why))
        self._rdmsr_result(value, site.length)
        return None

    def _rdmsr_result(self, value: int, length: int) -> None:
        self.set_gpr(RAX, value & 0xFFFFFFFF)
        self.set_gpr(RDX, value >> 32 & 0xFFFFFFFF)
        self.advance(length)

    def _wrmsr(self, site: Site) -> int | None:
        if self._registers.cpl:
            return self.no_privilege()
        registers = self._registers
        number = registers.gpr(RCX) & 0xFFFFFFFF
        value = registers.gpr(RAX) & 0xFFFFFFFF | (registers.gpr(RDX) & 0xFFFFFFFF) << 32
        if self._policy.msr_filter is not None and not self._policy.msr_filter.allows(number, kvm.KVM_MSR_FILTER_WRITE):
            return self._msr_to_user(site, kvm.KVM_EXIT_X86_WRMSR, number, value, kvm.KVM_MSR_EXIT_REASON_FILTER)
        try:
            self._cpu.msrs.write(number, value)
        except NoSuchMsr as why:
            return self._msr_to_user(site, kvm.KVM_EXIT_X86_WRMSR, number, value, _reason(why))
        self.advance(site.length)
        return None

    def _msr_to_user(self, site: Site, exit_reason: int, number: int, value: int, reason: int) -> int | None:
        if not self._policy.msr_reasons & reason:
            return self.no_privilege()
        self._site = site
        self.pending = self._msr_done
        self._msr_read = exit_reason == kvm.KVM_EXIT_X86_RDMSR
        return self._page.payload(exit_reason, "<B7xIIQ", 0, reason, number, value)

    _msr_read = False

    def _msr_done(self) -> int | None:
        if self._page.read("<B", 32):
            return self.no_privilege()
        if self._msr_read:
            self._rdmsr_result(self._page.read("<Q", 48), self._site.length)
        else:
            self.advance(self._site.length)
        return None
