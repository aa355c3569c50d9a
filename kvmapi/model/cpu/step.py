"""One instruction, executed alone: for MMIO, single steps, and whatever the running engine cannot be trusted with.

The engine that runs the guest has translated blocks full of stop hooks, and neither an instruction count nor a hook
reaches a block that is translated already. So there is a second engine per vCPU, made when it is first needed, without
those hooks. It starts with empty caches each time: the CPU structure is copied in, one instruction (or one repetition
of a string instruction) is executed, and the structure is copied back if that succeeded.

What the instruction did to memory the running engine sees at once, as both have the same windows of it. Its translated
code is compared with memory when the step may have stored to a page; its TLB is flushed unless the caller knows that
the instruction is none that changes translation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc

from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import stubs
from kvmapi.model.cpu.lengths import MAX_LENGTH
from kvmapi.model.cpu.mmu import SCRATCH_AT, EngineMemory
from kvmapi.model.cpu.native import Native, TlbEntry, TlbFill

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

Watch = Callable[[int, int, int, int, int, int], None]
_BUFFER = 1 << 20  # bytes for translated code: it never holds more than an instruction


class Stepper:
    """The second engine of one vCPU. Uses `cpu.mmu.fault` and `cpu.event` to tell what stopped an instruction."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._native: Native | None = None
        self._memory: EngineMemory | None = None
        self._scratch_gpa = -1
        self.system = False
        self._stored = False
        self._pages: frozenset[int] = frozenset()  # where the instruction stands
        self._went_on = False
        self._generation = -1

    def destroy(self) -> None:
        """Free the engine, if there is one."""
        if self._native is not None:
            self._native.close()
            self._native = None

    def _make(self) -> Native:
        native = Native(_BUFFER)
        self._memory = EngineMemory(native, self._cpu.physical, self._cpu.scratch_address)
        native.hook_tlb_fill(TlbFill(self._fill))
        native.hook_interrupts(self._interrupted)
        native.quieten(self._cpu.where.quiet)
        self._native = native
        return native

    def fault_address(self) -> int:
        """The address of the access that was refused last."""
        return self._native.fault_address(self._cpu.where.invalid_addr) if self._native is not None else 0

    def run(self, watch: Watch | None = None, *, scratch_gpa: int = -1, system: bool = False) -> int:
        """Execute one instruction in the second engine; a UC_ERR_* number. Nothing is copied back yet: `commit`.

        `watch` is told of each data access; `scratch_gpa` is a page that the scratch page stands for; `system` lets
        user code's instruction reach supervisor pages, as the processor does when it reads descriptor tables.
        """
        cpu, native = self._cpu, self._native or self._make()
        self._scratch_gpa, self.system, self._stored = scratch_gpa, system, False
        self._generation = cpu.physical.generation
        if self._memory is not None:
            self._memory.drop_dead()
        native.end_blocks_after(cpu.registers.linear_rip, len(cpu.code_here()))  # a block may run into a page that the instruction does not
        native.flush_code()
        native.flush_tlb()
        self._copy(cpu.native.state, native.state)
        # The request to stop is made before the instruction and noticed after its block, which is that instruction:
        # nothing behind it, or where it jumps to, is translated.
        hooks = [native.hook_code(cpu.registers.linear_rip, stubs.exported("uc_emu_stop"))]
        if watch is not None:
            hook, _callback = native.hook_memory(watch)
            hooks.append(hook)
        rip = cpu.registers.linear_rip
        self._pages = frozenset((rip & -PAGE, rip + MAX_LENGTH - 1 & -PAGE))
        self._went_on = False
        try:
            error = native.start(cpu.registers.rip)
        finally:
            for hook in hooks:
                native.unhook(hook)
        return uc.UC_ERR_OK if self._went_on and cpu.mmu.fault is None else error

    def commit(self, *, flush: bool = True) -> None:
        """The instruction counts: its registers become the vCPU's. `flush`: it may have changed translation."""
        cpu = self._cpu
        if self._native is not None:
            self._copy(self._native.state, cpu.native.state)
        if self._stored:
            cpu.code.verify()
        if flush:
            cpu.native.flush_tlb()

    def _copy(self, source: memoryview, target: memoryview) -> None:
        """The CPU structure but for the engine's own breakpoint objects, to which pointers stand behind DR0-DR7."""
        pointers = self._cpu.where.debug + 64
        target[:pointers] = source[:pointers]
        target[pointers + 32 :] = source[pointers + 32 :]

    # ---- callbacks from inside the second engine
    def _interrupted(self, _uc: int, number: int, _data: int) -> None:
        self._cpu.event = number
        if self._native is not None:
            self._native.stop()

    def _fill(self, _uc: int, va: int, kind: int, entry: int, _data: int) -> bool:
        mmu, physical = self._cpu.mmu, self._cpu.physical
        write, fetch = kind == uc.UC_MEM_WRITE, kind == uc.UC_MEM_FETCH
        try:
            gfn, private, _ = mmu.translate(va, write, fetch, user=self._cpu.registers.cpl == 3 and not self.system)
            slot = TlbEntry.from_address(entry)
            if gfn << 12 == self._scratch_gpa:
                slot.paddr, slot.perms = SCRATCH_AT, uc.UC_PROT_READ | uc.UC_PROT_WRITE
                return True
            window, offset, _ = physical.locate(gfn, private, write)
            if physical.generation != self._generation and self._native is not None:
                self._generation = physical.generation  # an alias of this page was given up
                self._native.flush_tlb()
            slot.paddr = self._memory.address(window, offset) if self._memory is not None else 0
            slot.perms = uc.UC_PROT_READ | (uc.UC_PROT_EXEC if fetch else uc.UC_PROT_WRITE if write else 0)
            self._stored |= write
        except Exception as why:  # nothing may be raised through the engine's C frames
            if fetch and va & -PAGE not in self._pages:  # the instruction is done: what comes next is not ours to judge
                self._went_on = True
                return False
            mmu.fetching, mmu.refused_page = fetch, va
            mmu.fault = why
            return False
        return True
