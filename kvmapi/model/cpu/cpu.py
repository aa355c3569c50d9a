"""One vCPU's processor: the engine, the MMU, and what the engine leaves to us.

`go` runs the guest until the VMM is needed. The engine stops for one of these reasons, looked at in this order:

1. the MMU refused an access: a guest fault is delivered, memory that is not there becomes MMIO, and an access that
   contradicts the memory attributes becomes a memory-fault exit. The instruction was not executed;
2. the engine raised an exception: it is delivered through the guest's IDT;
3. a stop hook: a sensitive instruction is next (code.py), and is executed here;
4. a kick: someone wants the vCPU or the engine lock.

The engine's CPU structure holds the registers and is edited in place between stops (state.py); RIP is passed to the
engine at each start.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import hazards, inject, layout, operands, scan
from kvmapi.model.cpu.code import CodeCache, Retranslate
from kvmapi.model.cpu.cpuid import Table
from kvmapi.model.cpu.debug import BP_VECTOR, DB_VECTOR, GuestDebug
from kvmapi.model.cpu.events import Events
from kvmapi.model.cpu.mmio import MmioUnit, scratch_page
from kvmapi.model.cpu.mmu import GP_VECTOR, PF_VECTOR, Fault, Mmu, UnsupportedMode
from kvmapi.model.cpu.msrs import Msrs
from kvmapi.model.cpu.native import Native, TlbFill
from kvmapi.model.cpu.paging import CR4_SMAP, PF_P, PF_U, PF_W
from kvmapi.model.cpu.privileged import ExitPolicy, Privileged
from kvmapi.model.cpu.state import GDT, IDT, LDT, RFLAGS_AC, TR, Registers
from kvmapi.model.cpu.step import Stepper, Watch
from kvmapi.model.mem.physical import EncryptedPhysical, Physical, Refused
from kvmapi.model.runpage import IMMEDIATE_EXIT, RunPage

if TYPE_CHECKING:
    from kvmapi.model.irq.lapic import Lapic

_AHEAD = 1024  # more than the instructions of a block
KICKED = 1 << 20  # no errno and no KVM_RUN result: the engine lock or the vCPU is wanted elsewhere
_UD, _SS = 6, 12
_CLAC, _STAC, _RDPMC = b"\x0f\x01\xca", b"\x0f\x01\xcb", b"\x0f\x33"
_INVALID_STATE = 0xFFFFFFFF  # SVM's exit code for a guest state that it refuses
_RF = 1 << 16
_HYPERCALLS = (b"\x0f\x01\xc1", b"\x0f\x01\xd9")  # vmcall, vmmcall: KVM accepts either (it patches the wrong one)


class Cpu:
    """The processor of one vCPU. Not thread-safe: the caller holds the VM's engine lock."""

    def __init__(self, physical: Physical, page: RunPage, index: int, policy: ExitPolicy) -> None:
        self.native = Native()
        self.where = layout.calibrate()
        self.registers = Registers(self.native, self.where)
        self.page = page
        self.physical = physical
        self._scratch_page, self.scratch_address = scratch_page()
        self.scratch = memoryview(self._scratch_page)
        self.kick = page.kick
        self.native.hook_kick(page.address + IMMEDIATE_EXIT)
        self.native.quieten(self.where.quiet)
        self.watching = (ctypes.c_uint32 * 1)()  # element 0: STI, POPF and IRET stop the engine
        self.code = CodeCache(self.native, self.watching, self._read_code)
        self.mmu = Mmu(self.native, self.where, physical, self.scratch_address, self.code, self._fetched)
        self.stepper = Stepper(self)
        self.cpuid = Table([])
        self.msrs = Msrs(self.registers, bootstrap=index == 0)
        self.privileged = Privileged(self, policy)
        self.events = Events(self)
        self.debug = GuestDebug(self)
        self.mmio = MmioUnit(self)
        self.refuses_entry = False  # a state that the processor does not enter the guest with
        self.attention = False  # events or debugging want a look before the guest is entered
        self.lapic: Lapic | None = None  # where KVM_CREATE_IRQCHIP made controllers
        self._policy = policy
        self._cr8 = 0
        self.event = -1  # the exception that the engine reported last
        self._stepped = False  # was it the stepper that ran last?
        self._code_generation = physical.code_generation
        self.native.hook_tlb_fill(TlbFill(self.mmu.fill))
        self.native.hook_interrupts(self._interrupted)
        self.reason = ""  # why the last internal error, in words

    @property
    def cr8(self) -> int:
        """The task priority, which the local APIC keeps where there is one."""
        return self._cr8 if self.lapic is None else self.lapic.cr8

    @cr8.setter
    def cr8(self, value: int) -> None:
        if self.lapic is None:
            self._cr8 = value
        else:
            self.lapic.cr8 = value

    def device_read(self, gpa: int, size: int) -> bytes | None:
        """A load from where no memory is; None: nobody but user space has a device there."""
        lapic, bus = self.lapic, self._policy.bus
        if lapic is not None and gpa & -PAGE == lapic.page:
            return lapic.read(gpa & (PAGE - 1), size).to_bytes(size, "little")
        return bus.read("mmio", gpa, size) if bus is not None else None

    def device_write(self, gpa: int, data: bytes) -> bool:
        """A store to where no memory is; False: user space must hear of it."""
        lapic, bus = self.lapic, self._policy.bus
        if lapic is not None and gpa & -PAGE == lapic.page:
            lapic.write(gpa & (PAGE - 1), len(data), int.from_bytes(data, "little"))
            return True
        return bus is not None and bus.write("mmio", gpa, data)

    def destroy(self) -> None:
        """Free the engine."""
        self.scratch.release()
        self.stepper.destroy()
        self.native.close()

    # ---- callbacks from inside the engine
    def _interrupted(self, _uc: int, number: int, _data: int) -> None:
        self.event = number
        self.native.stop()

    def _read_code(self, va: int, size: int) -> bytes:
        return self.mmu.read_code(va, size)

    def _fetched(self, va: int, gfn: int, pointer: int, address: int) -> None:
        if self.physical.code_generation != self._code_generation:  # a frame with code was given up just now
            raise Retranslate
        self.code.secret = self.mmu.c_mask != 0
        self.code.fetched(va, pointer, address)
        if isinstance(self.physical, EncryptedPhysical):
            self.physical.executed(gfn)

    # ---- running
    def go(self) -> int:
        """Run until the VMM is needed: KVM_RUN's result with the exit written, or KICKED."""
        while True:
            self.catch_up()
            if self.attention:
                result = self._attend()
                if result is not None:
                    return result
                if self.debug.active:
                    continue
            self.mmu.fault, self.event, self._stepped = None, -1, False
            error = self.native.start(self.registers.rip)
            self.code.look()
            result = self._stopped(error)
            if result is not None:
                return result
            if self.kick[0] or self.page.memory[IMMEDIATE_EXIT]:
                return KICKED  # a guest that is stopped again and again may never come to the next block

    def _attend(self) -> int | None:
        """Deliver events; while debugging, execute one instruction. KVM_RUN's result, KICKED, or None."""
        debug = self.debug
        if self.refuses_entry:
            return self.page.payload(kvm.KVM_EXIT_FAIL_ENTRY, "<QI", _INVALID_STATE, 0)
        result = debug.completed()
        if result is None:
            result = self.events.before_entry()
        if result is not None:
            return result
        if debug.active:
            self.attention = True
            if self.kick[0] or self.page.memory[IMMEDIATE_EXIT]:
                return KICKED
            return debug.step()
        return None

    def catch_up(self) -> None:
        """Drop translations that changes elsewhere made void."""
        physical = self.physical
        if physical.code_generation != self._code_generation:
            self._code_generation = physical.code_generation
            self.code.flush()
        if self.mmu.catch_up():
            self.native.flush_tlb()

    def step(self, watch: Watch | None = None, *, flush: bool = True, system: bool = False) -> int:
        """Execute exactly one instruction (or one repetition); a UC_ERR_* number for `after_step`. Slow: for single
        steps and the like. The parameters are Stepper's.
        """
        self.mmu.fault, self.event = None, -1
        if hazards.aborts(self._code_here(), 0, self.registers.code_bits):
            self.event = _UD
            return uc.UC_ERR_OK
        error = self.stepper.run(watch, system=system)
        self._stepped = True
        if self.mmu.fault is None:
            self.stepper.commit(flush=flush)
        return error

    def try_step(self, watch: Watch, scratch_gpa: int) -> None:
        """The same with a scratch page at `scratch_gpa`, and nothing kept until `stepper.commit`."""
        self.mmu.fault, self.event, self._stepped = None, -1, True
        self.stepper.run(watch, scratch_gpa=scratch_gpa)

    def fault_address(self) -> int:
        """The address of the access that was refused last."""
        return self.stepper.fault_address() if self._stepped else self.native.fault_address(self.where.invalid_addr)

    def after_step(self, error: int) -> int | None:
        """Deal with what a single step ran into; None when it was executed, or when the guest goes on in a handler."""
        if self.mmu.fault is not None:
            return self.refused(self.mmu.fault)
        if self.event >= 0:
            return self._exception()
        if error in (uc.UC_ERR_INSN_INVALID, uc.UC_ERR_EXCEPTION):
            return self._invalid_opcode()
        return None if error == uc.UC_ERR_OK else self.internal_error(f"the engine stopped with error {error}")

    def touches(self, where: int, size: int, linear: int, length: int) -> bool:
        """Does an access at engine-physical [where, where+size) meet guest-virtual [linear, linear+length)?"""
        try:
            gfn, encrypted, _ = self.mmu.translate(linear & -PAGE, False, False, False)
            window, offset, _ = self.physical.locate(gfn, encrypted, False)
        except (Fault, Refused, UnsupportedMode):
            return False
        at = window.base + offset + (linear & (PAGE - 1))
        return where < at + length and at < where + size

    def _stopped(self, error: int) -> int | None:
        """What to do about a stop: KVM_RUN's result, KICKED, or None to go on."""
        fault = self.mmu.fault if error != uc.UC_ERR_OK else None  # after a run the engine may look for code at exits: no access
        if fault is not None:
            return self.refused(fault)
        if self.event >= 0:
            return self._exception()
        if error == uc.UC_ERR_OK:
            code, registers = self.code, self.registers
            bits = registers.code_bits
            rip = registers.rip if bits == 64 else registers.linear_rip
            if rip in code.breakpoints:
                return self._at_breakpoint(rip)
            site = code.site(rip, bits)
            if site is not None:
                return self.privileged.execute(site)
            if self.kick[0] or self.page.memory[IMMEDIATE_EXIT]:
                return KICKED
            if code.stale:
                code.flush_blocks()
            elif code.hooked(rip):  # for what stood here before, or for code of another width
                return self.after_step(self.step())
            return None
        if error in (uc.UC_ERR_INSN_INVALID, uc.UC_ERR_EXCEPTION):
            return self._invalid_opcode()
        return self.internal_error(f"the engine stopped with error {error}")

    def _at_breakpoint(self, rip: int) -> int | None:
        """An execution breakpoint of user space; with RFLAGS.RF set, the instruction is executed all the same."""
        hits = self.debug.hits(rip)
        if hits:
            return self.debug.strike(hits)
        site = self.code.site(rip, self.registers.code_bits)
        self.registers.set_flags(self.native.flags() & ~_RF)
        if site is not None:
            return self.privileged.execute(site)
        return self.after_step(self.step())

    # ---- refused accesses
    def _looked_ahead(self) -> bool:
        """Did the engine, translating a block, run into a page that RIP may never reach?"""
        if not self.mmu.fetching or self._stepped:
            return False
        return self.mmu.refused_page != self.registers.linear_rip & -PAGE

    def _go_to_the_edge(self) -> int | None:
        """Execute what lies before the page that cannot be fetched, one by one: an instruction that reaches into it ends in
        the fault, and others are executed.
        """
        page = self.registers.linear_rip & -PAGE
        for _ in range(_AHEAD):
            rip = self.registers.linear_rip
            if rip & -PAGE != page or self.kick[0] or self.page.memory[IMMEDIATE_EXIT]:
                break
            site = hazards.find(self._code_here(), 1, self.registers.code_bits).get(0)
            if site is not None:
                return self.privileged.execute(site)
            error = self.step()
            if error != uc.UC_ERR_OK or self.mmu.fault is not None or self.event >= 0:
                return self.after_step(error)
        return None

    def _code_here(self) -> bytes:
        """Up to 15 bytes at RIP, as far as they can be fetched."""
        rip = self.registers.linear_rip
        for size in (scan.MAX_LENGTH, min(scan.MAX_LENGTH, PAGE - (rip & (PAGE - 1)))):
            with contextlib.suppress(Fault, Refused):
                return self.mmu.read_code(rip, size)
        return b""

    def refused(self, why: Exception) -> int | None:
        if isinstance(why, Retranslate):
            if self.code.stale:
                self.code.flush_blocks()
            return None
        if self._looked_ahead():
            return self._go_to_the_edge()
        if isinstance(why, Fault):
            if why.vector == PF_VECTOR:
                why.address, bits = self.fault_address(), self.registers.code_bits
                if (
                    why.error is not None
                    and not why.error & PF_W
                    and not self.mmu.fetching
                    and operands.modifies_memory(self._code_here(), bits)
                ):
                    why.error |= PF_W  # a processor asks for the right to store before it loads
                if self._reads_descriptors(why):
                    return self.after_step(self.step(flush=False, system=True))
            elif why.vector == GP_VECTOR and not self.mmu.fetching and self._through_stack():
                why.vector = _SS
            return self.raise_in_guest(why.vector, why.error, why.address)
        if isinstance(why, Refused):
            if why.kind == "mmio":
                return self.mmio.begin(why)
            return self.refused_result(why)
        if isinstance(why, UnsupportedMode):
            return self.internal_error(f"the model has no {why}")
        if isinstance(why, MemoryError):
            return -12
        raise why

    def refused_result(self, why: Refused) -> int:
        """The KVM_RUN result of an access that the backings refuse."""
        if why.kind == "fault":
            self.page.memory_fault(why.gpa, why.private)
        elif why.kind == "hva":
            self.page.head(kvm.KVM_EXIT_UNKNOWN)
        else:
            return self.internal_error(f"guest memory at {why.gpa:#x} is needed and is not there")
        return -why.number

    def _reads_descriptors(self, fault: Fault) -> bool:
        """Is this user code whose instruction reads a descriptor or a TSS? The processor does that with the supervisor's
        rights, and the engine's TLB does not say who asks.
        """
        if fault.error is None or fault.error & (PF_P | PF_U) != PF_P | PF_U or self._stepped:
            return False
        tables = (self.registers.segment(number) for number in (GDT, LDT, TR, IDT))
        if not any(0 <= fault.address - table.base <= table.limit for table in tables):
            return False
        return operands.loads_descriptor(self._code_here(), self.registers.code_bits)

    def _through_stack(self) -> bool:
        """Was the refused address, which is not canonical, of the stack segment?"""
        return self.registers.long_mode and operands.through_stack(self._code_here(), self.fault_address(), self.registers.gpr(4))

    # ---- exceptions
    def _exception(self) -> int | None:
        vector = self.event
        software = bool(self.registers.u32[(self.where.error_code >> 2) + 1])
        error = self.registers.forget_exception()
        if vector == _UD and not software:
            return self._invalid_opcode()
        if vector == BP_VECTOR and self.debug.catches_int3:
            return self.debug.int3()
        if vector == DB_VECTOR and self.debug.catches_db:
            return self.debug.trapped()
        return self.raise_in_guest(vector, error & 0xFFFF, software=software)

    def _invalid_opcode(self) -> int | None:
        registers, is_int = self.registers, self.where.error_code + 4
        if registers.u32[is_int >> 2]:  # INT 6
            registers.rip, registers.u32[is_int >> 2] = registers.u64[is_int + 4 >> 3], 0
            return self.raise_in_guest(_UD, None, software=True)
        code = self.code.bytes_at(registers.linear_rip, 4)
        if code[:3] in (_CLAC, _STAC) and self.cpuid.cr4_valid & CR4_SMAP and not registers.cpl:
            registers.set_flags(self.native.flags() & ~RFLAGS_AC | (RFLAGS_AC if code[:3] == _STAC else 0))
            self.privileged.advance(3)
            return None
        if code[:2] == _RDPMC:  # there are no counters
            return self.raise_in_guest(GP_VECTOR, 0)
        prefix = 1 if code[:1] in (b"\xf3", b"\xf2", b"\x66") else 0
        if code[prefix : prefix + 3] in _HYPERCALLS:
            return self.privileged.hypercall(prefix + 3)
        return self.raise_in_guest(_UD, None)

    def raise_in_guest(
        self, vector: int, error: int | None, address: int = 0, *, software: bool = False, external: bool = False
    ) -> int | None:
        """Deliver an exception, or with `external` an interrupt or NMI; None to go on, or the result of KVM_RUN when
        the guest cannot take it.
        """
        if vector == PF_VECTOR:
            self.registers.set_cr(2, address)
        try:
            flags = self.native.flags() | self.debug.delivered(vector)
            if external:
                inject.deliver_external(self.registers, self.mmu, flags, vector)
            else:
                inject.deliver(self.registers, self.mmu, flags, vector, error, software=software)
        except inject.TripleFault:
            return self.page.head(kvm.KVM_EXIT_SHUTDOWN)
        except Refused as why:
            if why.kind == "mmio":
                self.reason = f"vector {vector} cannot be delivered: a table or stack lies outside memory at {why.gpa:#x}"
                return self.page.internal_error(kvm.KVM_INTERNAL_ERROR_DELIVERY_EV, 1 << 31 | 3 << 8 | vector, 0, 0, why.gpa)
            return self.refused_result(why)
        except (UnsupportedMode, inject.UnsupportedDelivery) as why:
            return self.internal_error(f"the model has no {why}")
        return None

    def internal_error(self, reason: str) -> int:
        """KVM_EXIT_INTERNAL_ERROR/EMULATION with the instruction bytes, as KVM reports what it cannot emulate."""
        self.reason = reason
        try:
            code = self.mmu.read(self.registers.linear_rip, 15)
        except (Fault, Refused, UnsupportedMode):
            code = b""
        words = [int.from_bytes(code[at : at + 8].ljust(8, b"\0"), "little") for at in (0, 8)]
        size_and_first = len(code) | (words[0] & 0xFFFFFFFFFFFFFF) << 8
        rest = words[0] >> 56 | words[1] << 8
        return self.page.internal_error(kvm.KVM_INTERNAL_ERROR_EMULATION, 1, size_and_first, rest & 0xFFFFFFFFFFFFFFFF)
