"""The VM side of the interrupt controllers: ioctls on a VM's fd.

There is a local APIC per vCPU. IOAPIC, two PICs and, once it is asked for, a PIT are here as well (KVM_CREATE_IRQCHIP), or
user space's own (KVM_CAP_SPLIT_IRQCHIP). Checks stand in the
kernel's order (kvm_vm_ioctl in virt/kvm/kvm_main.c, kvm_arch_vm_ioctl in arch/x86/kvm/x86.c).
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable

from kvmapi.abi import ioctls, kvm
from kvmapi.model.caller import Caller, Errno
from kvmapi.model.coalesced import CoalescedIo
from kvmapi.model.cpu.policy import ExitPolicy
from kvmapi.model.irq import irqfd, kernel_bus, routing
from kvmapi.model.irq.bus import InterruptBus
from kvmapi.model.irq.ioapic import IoApic
from kvmapi.model.irq.irqfd import Irqfds
from kvmapi.model.irq.kernel_bus import KernelBus
from kvmapi.model.irq.message_bus import MessageBus
from kvmapi.model.irq.pic import Pic
from kvmapi.model.irq.pit import CHANNEL, Pit
from kvmapi.model.irq.split import SplitBus

_SUPPRESS, _BROADCAST = kvm.KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST, kvm.KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST
X2APIC_API = kvm.KVM_X2APIC_API_USE_32BIT_IDS | kvm.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK | _SUPPRESS | _BROADCAST
_CHIP_AT, _CHIP_SIZE = 8, 512
_PIT2_REST = 40  # of kvm_pit_state2, behind the counters: flags and reserved words
_LONGEST_CYCLE = ((1 << 64) - 1) // (0xFFFFFFFF * 128)
_MSI = struct.Struct("<IIII16x")


class VmInterrupts:
    """Interrupt controllers and in-kernel I/O of one VM. `bus` is None until one of the two is asked for."""

    def __init__(self, exits: ExitPolicy) -> None:
        self.bus: MessageBus | None = None
        self._exits = exits
        self._kernel_bus = KernelBus()
        self.coalesced = CoalescedIo(self._coalesce)
        self._irqfds = Irqfds()
        self._pit_mutex = threading.Lock()
        self._wide_ids = False
        self._broadcast_quirk = True
        self._suppression: bool | None = None

    def handlers(self) -> dict[int, Callable[[int, Caller], int]]:
        """By request number; KVM_CREATE_IRQCHIP is the VM's, because it must know the vCPUs."""
        return {
            ioctls.KVM_GET_IRQCHIP: self._get_irqchip,
            ioctls.KVM_SET_IRQCHIP: self._set_irqchip,
            ioctls.KVM_CREATE_PIT: self._create_pit,
            ioctls.KVM_CREATE_PIT2: self._create_pit2,
            ioctls.KVM_GET_PIT: lambda arg, caller: self._get_pit(arg, caller, b""),
            ioctls.KVM_SET_PIT: lambda arg, caller: self._set_pit(arg, caller, extended=False),
            ioctls.KVM_GET_PIT2: lambda arg, caller: self._get_pit(arg, caller, bytes(_PIT2_REST)),
            ioctls.KVM_SET_PIT2: lambda arg, caller: self._set_pit(arg, caller, extended=True),
            ioctls.KVM_REINJECT_CONTROL: self._reinject_control,
            ioctls.KVM_IRQ_LINE: self._irq_line,
            ioctls.KVM_IRQ_LINE_STATUS: self._irq_line_status,
            ioctls.KVM_SET_GSI_ROUTING: self._set_gsi_routing,
            ioctls.KVM_SIGNAL_MSI: self._signal_msi,
            ioctls.KVM_IRQFD: self._irqfd,
            ioctls.KVM_IOEVENTFD: self._ioeventfd,
            **self.coalesced.handlers(),
        }

    def destroy(self) -> None:
        """The VM goes away."""
        self._irqfds.destroy()
        self._exits.bus = None
        self._kernel_bus.destroy()
        self.coalesced.destroy()
        if self.bus is not None:
            self.bus.destroy()

    def create(self, has_vcpus: bool) -> None:
        """KVM_CREATE_IRQCHIP: EEXIST the second time, EINVAL once there are vCPUs."""
        if self.bus is not None:
            raise Errno(errno.EEXIST)
        if has_vcpus:
            raise Errno(errno.EINVAL)
        self.bus = self._kernel_bus.interrupts = InterruptBus()
        self._apply_x2apic_api()
        self._exits.bus = self._kernel_bus

    def split(self, reserved: int, has_vcpus: bool) -> None:
        """KVM_CAP_SPLIT_IRQCHIP with `reserved` routes for user space's IOAPIC. EINVAL: more than there can be; EEXIST: there are
        controllers, or vCPUs.
        """
        if reserved > routing.MAX_ROUTES:
            raise Errno(errno.EINVAL)
        if self.bus is not None or has_vcpus:
            raise Errno(errno.EEXIST)
        self.bus = SplitBus(reserved)
        self._apply_x2apic_api()

    @property
    def x2apic_api(self) -> int:
        """KVM_CAP_X2APIC_API of this VM."""
        return X2APIC_API if isinstance(self.bus, SplitBus) else X2APIC_API & ~_SUPPRESS

    def enable_x2apic_api(self, flags: int) -> None:
        """KVM_CAP_X2APIC_API. What is on stays on; of the two about broadcasts of ends, the last counts."""
        if flags & ~self.x2apic_api or flags & (_SUPPRESS | _BROADCAST) == _SUPPRESS | _BROADCAST:
            raise Errno(errno.EINVAL)
        if flags & (_SUPPRESS | _BROADCAST):
            self._suppression = flags & _SUPPRESS != 0
        self._wide_ids |= bool(flags & kvm.KVM_X2APIC_API_USE_32BIT_IDS)
        self._broadcast_quirk &= not flags & kvm.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
        self._apply_x2apic_api()

    def set_cycle(self, ns: int, has_vcpus: bool) -> None:
        """KVM_CAP_X86_APIC_BUS_CYCLES_NS. EINVAL: 0, more than the longest count's product can hold, vCPUs; ENXIO without controllers."""
        if not 0 < ns <= _LONGEST_CYCLE:
            raise Errno(errno.EINVAL)
        bus = self._bus_or(errno.ENXIO)
        if has_vcpus:
            raise Errno(errno.EINVAL)
        bus.cycle_ns = ns

    @property
    def cycle_ns(self) -> int:
        """A bus cycle of the local APICs in nanoseconds."""
        return self.bus.cycle_ns if self.bus is not None else 1

    def _apply_x2apic_api(self) -> None:
        if self.bus is not None:
            with self.bus:
                self.bus.wide_ids, self.bus.broadcast_quirk = self._wide_ids, self._broadcast_quirk
                self.bus.addresses_changed()
                if isinstance(self.bus, SplitBus):
                    self.bus.suppression = self._suppression
                    self.bus.find_pins()

    def _bus_or(self, number: int) -> MessageBus:
        if self.bus is None:
            raise Errno(number)
        return self.bus

    def _chips_or(self, number: int) -> InterruptBus:
        if not isinstance(self.bus, InterruptBus):
            raise Errno(number)
        return self.bus

    # ---- IOAPIC and PICs
    def _get_irqchip(self, arg: int, caller: Caller) -> int:
        data = bytearray(caller.memory.read(arg, _CHIP_AT + _CHIP_SIZE))
        bus, chip = self._chip(data)
        with bus:
            state = chip.pack()
        data[_CHIP_AT : _CHIP_AT + len(state)] = state
        caller.memory.write(arg, bytes(data))
        return 0

    def _set_irqchip(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, _CHIP_AT + _CHIP_SIZE)
        bus, chip = self._chip(data)
        with bus:
            chip.unpack(data[_CHIP_AT:])
            bus.pics.update()
        return 0

    def _chip(self, data: bytes | bytearray) -> tuple[InterruptBus, IoApic | Pic]:
        bus = self._chips_or(errno.ENXIO)
        chips: dict[int, IoApic | Pic] = {
            kvm.KVM_IRQCHIP_PIC_MASTER: bus.pics.master,
            kvm.KVM_IRQCHIP_PIC_SLAVE: bus.pics.slave,
            kvm.KVM_IRQCHIP_IOAPIC: bus.ioapic,
        }
        chip = chips.get(struct.unpack_from("<I", data)[0])
        if chip is None:
            raise Errno(errno.EINVAL)
        return bus, chip

    # ---- the PIT
    def _create_pit(self, arg: int, caller: Caller) -> int:
        return self._make_pit(kvm.KVM_PIT_SPEAKER_DUMMY)

    def _create_pit2(self, arg: int, caller: Caller) -> int:
        return self._make_pit(struct.unpack("<I60x", caller.memory.read(arg, 64))[0])

    def _make_pit(self, flags: int) -> int:
        with self._pit_mutex:
            bus = self._chips_or(errno.ENOENT)
            if bus.pit is not None:
                raise Errno(errno.EEXIST)
            bus.create_pit(speaker=bool(flags & kvm.KVM_PIT_SPEAKER_DUMMY))
        return 0

    def _pit(self) -> tuple[InterruptBus, Pit]:
        bus = self._chips_or(errno.ENXIO)
        if bus.pit is None:
            raise Errno(errno.ENXIO)
        return bus, bus.pit

    def _get_pit(self, arg: int, caller: Caller, rest: bytes) -> int:
        bus, pit = self._pit()
        with bus:
            state = pit.pack() + (struct.pack("<I", pit.flags) + rest[4:] if rest else b"")
        caller.memory.write(arg, state)
        return 0

    def _set_pit(self, arg: int, caller: Caller, *, extended: bool) -> int:
        size = 3 * CHANNEL.size
        data = caller.memory.read(arg, size + (_PIT2_REST if extended else 0))
        bus, pit = self._pit()
        with bus:
            pit.unpack(data, struct.unpack_from("<I", data, size)[0] if extended else None)
        return 0

    def _reinject_control(self, arg: int, caller: Caller) -> int:
        data = caller.memory.read(arg, 32)
        bus, pit = self._pit()
        with bus:
            pit.set_reinject(bool(data[0]))
        return 0

    # ---- lines and messages
    def _irq_line(self, arg: int, caller: Caller) -> int:
        self._line(arg, caller)
        return 0

    def _irq_line_status(self, arg: int, caller: Caller) -> int:
        status, level = self._line(arg, caller)
        caller.memory.write(arg, struct.pack("<iI", status, level))
        return 0

    def _line(self, arg: int, caller: Caller) -> tuple[int, int]:
        gsi, level = struct.unpack("<II", caller.memory.read(arg, 8))
        return self._bus_or(errno.ENXIO).line(gsi, bool(level)), level

    def _set_gsi_routing(self, arg: int, caller: Caller) -> int:
        count, flags = struct.unpack("<II", caller.memory.read(arg, 8))
        bus = self._bus_or(errno.EINVAL)
        if count > routing.MAX_ROUTES or flags:
            raise Errno(errno.EINVAL)
        data = caller.memory.read(arg + 8, count * routing.ENTRY.size) if count else b""
        routes = routing.from_entries(data, bus.wide_ids, chips=not bus.split)
        if routes is None:
            raise Errno(errno.EINVAL)
        bus.set_routes(routes)
        return 0

    def _signal_msi(self, arg: int, caller: Caller) -> int:
        low, high, data, flags = _MSI.unpack(caller.memory.read(arg, _MSI.size))
        bus = self._bus_or(errno.EINVAL)
        if flags & ~kvm.KVM_MSI_VALID_DEVID:
            raise Errno(errno.EINVAL)
        return bus.msi(high << 32 | low, data)

    # ---- eventfds
    def _irqfd(self, arg: int, caller: Caller) -> int:
        self._irqfds.irqfd(caller.memory.read(arg, irqfd.SIZE), self.bus, caller)
        return 0

    def _ioeventfd(self, arg: int, caller: Caller) -> int:
        self._kernel_bus.ioeventfd(caller.memory.read(arg, kernel_bus.SIZE), caller)
        self._exits.bus = self._kernel_bus
        return 0

    def _coalesce(self) -> None:
        self._kernel_bus.coalesced, self._exits.bus = self.coalesced, self._kernel_bus
