"""A foreign guest's machine: the PC of `vmm.pc` built around a Multiboot or Linux image.

Devices: the serial port, the exit port, fw_cfg, the timers that count, and what kvm-unit-tests expect of a test device.
Interrupt controllers are the kernel's where it offers them (KVM_CAP_IRQCHIP); where it does not, `vmm.apic` answers for
the local APIC.

Only the first vCPU starts; the others wait for its INIT and startup IPIs, as on a PC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls
from vmm import acpi, fw_cfg, linux_boot, multiboot, pc, serial, testdev, timers
from vmm.apic import Apic
from vmm.image import LINUX64, MULTIBOOT
from vmm.rungs import Unsupported

if TYPE_CHECKING:
    from kvmapi.abi.vcpu import kvm_cpuid_entry2
    from kvmapi.vcpu import Vcpu
    from kvmapi.vm import Vm
    from vmm.devices import Devices
    from vmm.image import Image

TSS_PAGES = 0xFFFBD000
"""Three pages that KVM on Intel needs for real mode; below the BIOS of a PC, where no guest has memory."""

_X2APIC, _TSC_DEADLINE = 1 << 21, 1 << 24


class PcMmio:
    """What answers the PC's MMIO exits: the test device's memory, and a local APIC where the host has none. The rest
    reads all ones.
    """

    def __init__(self, apic: Apic | None = None) -> None:
        self.unknown = 0
        self._apic = apic
        self._memory = testdev.TestMemory()

    def read(self, gpa: int, length: int, vcpu: int = 0) -> bytes:
        """`length` bytes at `gpa` as `vcpu` sees them."""
        if self._memory.holds(gpa, length):
            return self._memory.read(gpa, length)
        if self._apic is not None and self._apic.holds(gpa):
            return self._apic.read(gpa, length, vcpu)
        self.unknown += 1
        return b"\xff" * length

    def write(self, gpa: int, data: bytes, vcpu: int = 0) -> None:
        """`data` written at `gpa` by `vcpu`."""
        if self._memory.holds(gpa, len(data)):
            self._memory.write(gpa, data)
        elif self._apic is not None and self._apic.holds(gpa):
            self._apic.write(gpa, data, vcpu)
        else:
            self.unknown += 1


class Pc:
    """One machine's PC: the devices around the guest, what the loader leaves in memory, the first registers."""

    def __init__(self, image: Image, memory: int, vcpus: int, arguments: bytes) -> None:
        self.image = image
        self.memory = memory
        self.vcpus = vcpus
        self.arguments = arguments
        self.in_kernel = False

    def add_controllers(self, vm: Vm) -> None:
        """Interrupt controllers of the host, where it has them; before there are vCPUs.

        Raises KvmError, and `Unsupported` for several vCPUs on a host without.
        """
        self.in_kernel = bool(vm.check_extension(caps.KVM_CAP_IRQCHIP))
        if not self.in_kernel and self.vcpus > 1:
            raise Unsupported(
                "this host has no in-kernel interrupt controllers, without which no second vCPU can be started", "ask for one"
            )
        if self.in_kernel:
            if vm.check_extension(caps.KVM_CAP_SET_TSS_ADDR):
                vm.ioctl(ioctls.KVM_SET_TSS_ADDR, TSS_PAGES)
            vm.create_irqchip()

    def add_devices(self, devices: Devices, vm: Vm | None = None) -> None:
        """Put the PC's devices on their ports; `vm` is whose interrupt lines the test device raises."""
        line, config, pit = serial.Serial(devices.console), fw_cfg.FwCfg(self.memory, self.vcpus), timers.Pit()
        for port in range(serial.BASE, serial.BASE + serial.REGISTERS):
            devices.ports.add(port, line.port)
        devices.ports.add(fw_cfg.SELECTOR, config.select)
        devices.ports.add(fw_cfg.DATA, config.data)
        for port in (*timers.PIT_PORTS, timers.CONTROL):
            devices.ports.add(port, pit.port)
        devices.ports.add(timers.GATE_PORT, pit.gate)
        devices.ports.add(timers.PM_PORT, timers.PmTimer().port)
        test = testdev.TestPorts(vm.irq_line if self.in_kernel and vm is not None else None)
        for port in range(testdev.WORD_PORT, testdev.WORD_PORT + testdev.WORD_PORTS):
            devices.ports.add(port, test.word)
        for port in range(testdev.LINE_PORT, testdev.LINE_PORT + testdev.LINES):
            devices.ports.add(port, test.line)
        devices.mmio = PcMmio(None if self.in_kernel else Apic())

    def adjust_cpuid(self, cpuid: list[kvm_cpuid_entry2]) -> None:
        """Take back what nobody here answers: x2APIC and its deadline timer, where the controllers are not the
        kernel's.
        """
        for entry in cpuid:
            if entry.function == 1 and not self.in_kernel:
                entry.ecx &= ~(_X2APIC | _TSC_DEADLINE)

    def pages(self) -> dict[int, bytes]:
        """What is written beside the image, by GPA."""
        if self.image.protocol == MULTIBOOT:
            loader = multiboot.pages(self.image, self.memory, self.arguments)
        else:
            loader = linux_boot.pages(self.image, self.memory, self.arguments, acpi.RSDP)
        return loader | acpi.tables(self.vcpus)

    def start(self, vcpu: Vcpu, index: int) -> None:
        """First registers of the vCPU that boots; the others stay as reset left them and wait for a startup IPI."""
        if index:
            return
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        pc.set_system_registers(sregs, long=self.image.protocol == LINUX64)
        vcpu.set_sregs(sregs)
        if self.image.protocol == MULTIBOOT:
            pc.set_registers(regs, self.image.entry, rax=multiboot.LOADER_MAGIC, rbx=pc.INFORMATION)
        else:
            pc.set_registers(regs, self.image.entry, rsi=pc.INFORMATION)
        vcpu.set_regs(regs)
