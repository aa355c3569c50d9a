"""What stands at 0xFEE00000 on a host without in-kernel interrupt controllers: a local APIC that knows who it is, and nothing else.

Registers remember what is written, the id and version registers say what a PC's would, interrupts never come: the timer does not count,
an IPI goes nowhere. That is enough for a guest with one CPU that identifies and enables its APIC and polls everything, and the reason
why such a host gets no second CPU (`vmm.foreign`).

Invariant: a guest makes this keep at most 256 registers per vCPU.
"""

from __future__ import annotations

from vmm.acpi import LOCAL_APIC

PAGE, REGISTER = 0x1000, 0x10
_ID, _VERSION, _ICR = 0x20, 0x30, 0x300
_VERSION_VALUE = 0x50014  # an integrated APIC with six local vectors
_ICR_BUSY = 1 << 12


class Apic:
    """The registers of every vCPU's APIC."""

    def __init__(self) -> None:
        self._registers: dict[tuple[int, int], int] = {}

    def holds(self, gpa: int) -> bool:
        """Whether `gpa` is in the APIC's page."""
        return LOCAL_APIC <= gpa < LOCAL_APIC + PAGE

    def read(self, gpa: int, length: int, vcpu: int = 0) -> bytes:
        """A register of `vcpu`'s APIC, 32 bits; what an access reads beyond them is 0."""
        offset = gpa - LOCAL_APIC
        register = offset & -REGISTER
        fixed = {_ID: vcpu << 24, _VERSION: _VERSION_VALUE}
        value = fixed.get(register, self._registers.get((vcpu, register), 0))
        return (value >> 8 * (offset % REGISTER)).to_bytes(8, "little")[:length]

    def write(self, gpa: int, data: bytes, vcpu: int = 0) -> None:
        """Remember 32 bits; narrower or unaligned writes are ignored, as the processor manuals leave them undefined."""
        offset = gpa - LOCAL_APIC
        if offset % REGISTER == 0 and len(data) >= 4:
            value = int.from_bytes(data[:4], "little")
            self._registers[vcpu, offset] = value & ~_ICR_BUSY if offset == _ICR else value
