"""What the VMM does about an exit: one `match` on the typed exit.

Plain port accesses normally do not come here; the run loop answers them itself (`vmm.runloop`), unless a tool wants to see every exit.
Nor do exits that ask for a conversion come as objects: the loop calls `hypercall` and `memory_fault` with the numbers.

Invariants
- every number of the guest's goes through `vmm.checks` before it is used;
- the guest is answered for every exit that waits for an answer: a hypercall gets 0 or a negative errno, a read gets a value;
- an exit that nobody knows ends the run with a sentence that holds everything the exit says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.exit_types import (
    ApResetHold,
    Exit,
    Hlt,
    Hypercall,
    InternalError,
    Io,
    MemoryFault,
    Mmio,
    Rdmsr,
    RunFailed,
    Shutdown,
    SystemEvent,
    Wrmsr,
)
from kvmapi.words import EHWPOISON
from vmm.checks import BadRange, GpaRange, check_map_gpa_range, check_range
from vmm.conversion import EXPLICIT, IMPLICIT, ConversionFailed, Converter
from vmm.termination import termination

if TYPE_CHECKING:
    from kvmapi.vcpu import Vcpu
    from vmm.devices import Devices
    from vmm.memory import GuestMemory

_MAP_GPA_RANGE = kvm.KVM_HC_MAP_GPA_RANGE
STUCK_FAULTS = 64
"""Memory faults of one vCPU in a row that change nothing: two vCPUs may fault on one page and the later one finds it done, but this often
it is a page that cannot be had."""


class Stop(Exception):
    """The run ends here with an error; one sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class Dispatcher:
    """Answers the exits of one VM's vCPUs; shared by their threads."""

    def __init__(self, memory: GuestMemory, converter: Converter, devices: Devices) -> None:
        self.memory = memory
        self.converter = converter
        self.devices = devices
        self.refused = 0
        self.last_refusal = ""
        self._stuck: dict[int, int] = {}

    def dispatch(self, vcpu: Vcpu, exit: Exit) -> bool:
        """Deal with `exit`, which is the one now in the vCPU's kvm_run; whether the vCPU goes on. Raises `Stop` or `GuestStop`."""
        match exit:
            case Hypercall(nr=nr, args=(gpa, pages, attributes, *_)):
                vcpu.answer_hypercall(self.hypercall(vcpu.id, nr, gpa, pages, attributes))
            case MemoryFault(gpa=gpa, size=size) if exit.errno == EHWPOISON:
                raise Stop(f"vCPU {vcpu.id}: the host's memory behind [{gpa:#x}, {gpa + size:#x}) is broken (EHWPOISON)")
            case MemoryFault(gpa=gpa, size=size):
                self.memory_fault(vcpu.id, gpa, size, exit.private)
            case Mmio(phys_addr=gpa, is_write=True, data=data):
                self.devices.mmio.write(gpa, data, vcpu.id)
            case Mmio(phys_addr=gpa, length=length):
                vcpu.answer_mmio(exit, self.devices.mmio.read(gpa, length, vcpu.id))
            case Rdmsr(index=index):
                value = self.devices.msr.read(index)
                vcpu.answer_msr(value or 0, error=value is None)
            case Wrmsr(index=index, data=value):
                vcpu.answer_msr(value, error=not self.devices.msr.write(index, value))
            case Io():
                self._io(vcpu, exit)
            case Hlt() | ApResetHold():  # without an interrupt controller nothing ends either
                return False
            case SystemEvent(type=kvm.KVM_SYSTEM_EVENT_SEV_TERM, data=(value, *_)):
                raise Stop(f"vCPU {vcpu.id} {termination(value)}")
            case Shutdown():
                raise Stop(f"vCPU {vcpu.id} shut down: a triple fault (an exception while it could not deliver one)")
            case InternalError():
                bytes_ = f", instruction {exit.insn_bytes.hex(' ')}" if exit.insn_bytes else ""
                raise Stop(f"vCPU {vcpu.id}: KVM gave up with {exit.name} {exit.suberror_name}{bytes_}, data {[hex(x) for x in exit.data]}")
            case SystemEvent():
                raise Stop(f"vCPU {vcpu.id} asked for {exit.type_name} {[hex(x) for x in exit.data]}")
            case RunFailed():
                raise Stop(f"vCPU {vcpu.id}: {exit}")
            case _:
                raise Stop(f"vCPU {vcpu.id} left with an exit that nothing here answers: {exit.name} ({exit.reason}): {exit!r}")
        return True

    def hypercall(self, vcpu: int, nr: int, gpa: int, pages: int, attributes: int) -> int:
        """What a hypercall of this vCPU gets for an answer: 0, or a negative errno. MAP_GPA_RANGE is a conversion; another number is
        answered as KVM answers one it does not know.
        """
        if nr != _MAP_GPA_RANGE:
            return -kvm.KVM_ENOSYS
        try:
            range, private = check_map_gpa_range(gpa, pages, attributes, self.converter.map)
            self.converter.convert(range, private, EXPLICIT, vcpu)
        except (BadRange, ConversionFailed) as refusal:
            self.refused += 1
            self.last_refusal = str(refusal)
            return refusal.code
        return 0

    def memory_fault(self, vcpu: int, gpa: int, size: int, wants_private: bool) -> None:
        """An implicit conversion: the page becomes what the access wants, or shared where there is nothing private to be had. Raises
        `Stop` where that cannot be.
        """
        map = self.converter.map
        try:
            range = check_range(gpa, size, map)
        except BadRange as refusal:
            kind = "a private" if wants_private else "a shared"
            raise Stop(f"vCPU {vcpu}: memory fault of {kind} access: {refusal}") from refusal
        private = wants_private and self.memory.holds_private(range)
        if map.is_private(gpa) != private:
            self._stuck[vcpu] = 0
        else:
            self._still_faults(vcpu, range, private)
        try:
            self.converter.convert(range, private, IMPLICIT, vcpu)
        except ConversionFailed as failure:
            raise Stop(f"vCPU {vcpu}: {range} cannot be converted: {failure}") from failure

    def _still_faults(self, vcpu: int, range: GpaRange, private: bool) -> None:
        """The page is what the access wants already. Raises `Stop` when that happens too often in a row."""
        stuck = self._stuck[vcpu] = self._stuck.get(vcpu, 0) + 1
        if stuck > STUCK_FAULTS:
            state = "private" if private else "shared"
            raise Stop(f"vCPU {vcpu} faults on {range} again and again, though it is {state} as the access wants")

    def _io(self, vcpu: Vcpu, exit: Io) -> None:
        data = bytearray(exit.data if exit.is_out else exit.size * exit.count)
        with memoryview(data) as view:
            self.devices.ports.find(exit.port)(exit.port, exit.size, exit.count, view, exit.is_out)
        if not exit.is_out:
            vcpu.answer_io(exit, bytes(data))
