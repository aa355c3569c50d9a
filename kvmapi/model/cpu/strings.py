"""INS and OUTS: port I/O with a memory operand, element by element, from where the last exit left it.

The state of the instruction is in the guest's registers only: RCX counts down and RSI or RDI moves with each element, so
that it goes on wherever an exit, a fault or an interrupt cut it short. KVM asks user space for one element of OUTS and for
up to a buffer of INS. Source: pio_in_emulated in arch/x86/kvm/emulate.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import PAGE
from kvmapi.model.cpu import ports
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.scan import Site
from kvmapi.model.cpu.state import ES, RCX, RDI, RDX, RSI
from kvmapi.model.mem.physical import Refused
from kvmapi.model.runpage import PIO_OFFSET

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.policy import ExitPolicy
    from kvmapi.model.cpu.privileged import Privileged

_U64 = 0xFFFFFFFFFFFFFFFF
_PIO_BUFFER = 1024  # bytes of string input KVM asks for at once
_DF = 1 << 10


class StringIo:
    """String I/O of one Cpu, for `up`. Each instruction returns KVM_RUN's result, or None when the guest goes on; raises
    Fault and Refused for its operand.
    """

    def __init__(self, up: Privileged, cpu: Cpu, policy: ExitPolicy) -> None:
        self._up = up
        self._registers, self._native, self._mmu, self._page = cpu.registers, cpu.native, cpu.mmu, cpu.page
        self._policy = policy
        self._site = Site("none", 0)
        self._backwards = False
        self._string_at = self._string_count = 0

    def outs(self, site: Site) -> int | None:
        """OUTS: one element, whatever REP says, as KVM asks for it."""
        if self._registers.cpl and not self._up.may_do_io(site):
            return self._up.no_privilege()
        address, count, backwards = self._string(site, RSI)
        if not count:
            self._up.advance(site.length)
            return None
        data = self._mmu.read(address, site.size, user=self._registers.cpl == 3)
        self._site = site
        self._backwards = backwards
        port, bus = self._registers.gpr(RDX) & 0xFFFF, self._policy.bus
        if bus is not None and bus.write("pio", port, data):
            self._outs_done()
            return None
        self._page.memory[PIO_OFFSET : PIO_OFFSET + site.size] = data
        self._up.pending = self._outs_done
        return self._page.io(kvm.KVM_EXIT_IO_OUT, site.size, port, 1)

    def _outs_done(self) -> None:
        self._move(self._site, RSI, 1, self._backwards)

    def ins(self, site: Site) -> int | None:
        """INS: as many elements as KVM asks for at once."""
        if self._registers.cpl and not self._up.may_do_io(site):
            return self._up.no_privilege()
        address, count, backwards = self._string(site, RDI)
        if not count:
            self._up.advance(site.length)
            return None
        room = (address & (PAGE - 1)) + site.size if backwards else PAGE - (address & (PAGE - 1))
        count = max(1, min(count, room // site.size, _PIO_BUFFER // site.size))
        self._site, self._backwards, self._string_at, self._string_count = site, backwards, address, count
        port = self._registers.gpr(RDX) & 0xFFFF
        if self._up.read_kernels(port, site.size, count):
            return self._ins_done()
        self._up.pending = self._ins_done
        return self._page.io(kvm.KVM_EXIT_IO_IN, site.size, port, count)

    def _ins_done(self) -> int | None:
        size, site = self._site.size, self._site
        left = self._registers.gpr(RCX) & (1 << 8 * site.address_size) - 1 if site.repeat else 1
        if not left:  # user space took the count away
            self._up.advance(site.length)
            return None
        for number in range(min(left, self._string_count)):
            at = PIO_OFFSET + number * size
            where = self._string_at + (-number if self._backwards else number) * size & _U64
            try:
                self._mmu.write(where, self._page.memory[at : at + size], user=self._registers.cpl == 3)
            except (Fault, Refused) as why:
                return self._up.operand_refused(why)
            self._move(site, RDI, 1, self._backwards)
        return None

    # ---- addresses and counts
    def _string(self, site: Site, index: int) -> tuple[int, int, bool]:
        """(linear address of the element, repetitions left and possible without a fault, backwards). Raises Fault when
        the element lies outside its segment.
        """
        registers = self._registers
        mask = (1 << 8 * site.address_size) - 1
        count, backwards = registers.gpr(RCX) & mask if site.repeat else 1, bool(self._native.flags() & _DF)
        segment, offset = ES if index == RDI else site.segment, registers.gpr(index) & mask
        if registers.long_mode:
            return (registers.segment(segment).base if segment >= 4 else 0) + offset & _U64, count, backwards
        if count:
            count = min(count, ports.room(registers, segment, offset, site.size, mask, store=index == RDI, backwards=backwards))
        return registers.segment(segment).base + offset & 0xFFFFFFFF, count, backwards

    def _move(self, site: Site, index: int, elements: int, backwards: bool) -> None:
        """Advance the index register and the count by so many elements; leave the instruction when the count is used
        up.
        """
        registers = self._registers
        mask = (1 << 8 * site.address_size) - 1
        step = -site.size if backwards else site.size
        self._set_index(index, registers.gpr(index) + elements * step, mask)
        left = 0
        if site.repeat:
            left = (registers.gpr(RCX) & mask) - elements
            self._set_index(RCX, left, mask)
        if not left:
            self._up.advance(site.length)

    def _set_index(self, number: int, value: int, mask: int) -> None:
        """A write of an address-sized register: 32 bits clear the upper half, 16 bits keep the rest."""
        old = self._registers.gpr(number) if mask == 0xFFFF else 0
        self._up.set_gpr(number, old & ~mask | value & mask)
