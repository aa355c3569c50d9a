"""One virtual machine from the first ioctl to the last close, in the only order that works.

    VM of its type -> (SEV: INIT2) -> capabilities -> memslots -> (SEV: pin) -> vCPUs, CPUID, registers -> image and boot pages
    -> attributes of a lazy test area -> (SEV: measured launch) -> run -> close

Why this order: INIT2 must precede vCPUs (arch/x86/kvm/svm/sev.c), CPUID precedes registers because KVM reserves CR3's C-bit by it,
memory is written before the launch because afterwards our own mapping of it shows ciphertext.

What is private at the start differs by type and is true in both the map and the tables the guest gets: on SEV and SEV-ES everything
but the shared page, the test area and the GHCBs; on SW_PROTECTED nothing, because user space has no way to put an image into private memory
there; on plain nothing.

Invariants: `Machine` either exists with everything built, or `build` raised and left nothing behind; `close` releases vCPUs, VM, memory,
system, in this order, and may be called twice.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmapi.abi import caps, kvm
from kvmapi.abi.vcpu import kvm_regs
from vmm import boot
from vmm.config import ConfigError, MachineConfig
from vmm.conversion import Converter, MapOnly
from vmm.devices import Devices
from vmm.dispatch import Dispatcher
from vmm.gpamap import GpaMap
from vmm.image import SEVMM
from vmm.memory import GuestMemfdBacking, GuestMemory
from vmm.rungs import TYPES, Unsupported
from vmm.runloop import Handler, Outcome, RunLoop

if TYPE_CHECKING:
    from kvmapi.abi.vcpu import kvm_cpuid_entry2
    from kvmapi.host import Host
    from kvmapi.system import System
    from kvmapi.vcpu import Vcpu
    from kvmapi.vm import Vm
    from vmm.foreign import Pc
    from vmm.launch import SevLaunch
    from vmm.measure import Measurement
    from vmm.report import LaunchReport

SLOT_LOW, SLOT_HIGH, SLOT_TEST, SLOT_ABOVE_TEST = 0, 1, 2, 3
_LEAF_SEV, _LEAF_KVM_FEATURES = 0x8000001F, 0x40000001
_HYPERCALL_MASK = 1 << kvm.KVM_HC_MAP_GPA_RANGE


class Machine:
    """A built machine: `memory`, `map`, `converter`, `devices`, `vcpus`, and after a SEV launch `launch`.

    >>> with Machine(config) as machine:              # doctest: +SKIP
    ...     machine.run(timeout=10).exit_code
    0
    """

    def __init__(self, config: MachineConfig) -> None:
        """Build everything; raises `ConfigError`, `Unsupported`, KvmError or OSError, and leaves nothing behind then."""
        config.check()
        if config.host is None:
            raise ConfigError("no host was chosen to build the machine on")
        self.host = config.host
        self.config = config
        self.type = TYPES[config.type]
        self.map = GpaMap()
        self.pc = _pc(config)
        self.devices = Devices(boot.HOLE, boot.MSR, config.console, foreign=self.pc is not None)
        self.launch: LaunchReport | None = None
        self.features = 0
        self.handlers: list[Handler] = []  # see every exit before the dispatcher; add to it before `run`
        self.c_mask = 0
        self.vcpus: list[Vcpu] = []
        self._areas: list[bytes] = []  # the VMSAs that the registers should become (SEV-ES)
        self._stack = ExitStack()
        with self._stack:
            self._build()
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        self._stack.close()

    def run(self, timeout: float | None = None) -> Outcome:
        """Run all vCPUs until the guest ends or `timeout` seconds have passed; a guest whose measurement is wrong is not run."""
        if self.launch is not None and not self.launch.match:
            return Outcome("error", message="the firmware's launch measurement is not the expected one: the guest was not run")
        return RunLoop(self.vcpus, self.devices.ports, self.dispatcher, self.handlers).run(timeout)

    def measurement(self, guest: str) -> Measurement | None:
        """What the launch measured, for a file (`vmm.saved_launch`); None without a launch. Needs `record` in the config."""
        from vmm.measure import INIT2, Answer, Measurement, Setup

        launch, config = self.launch, self.config
        if launch is None:
            return None
        setup = Setup(
            guest, config.type, launch.policy, config.memory, config.vcpus, config.arguments, INIT2,
            self.c_mask.bit_length() - 1, self.features,
        )  # fmt: skip
        answer = Answer(launch.version, launch.nonce, launch.measure)
        return Measurement("launch", setup, launch.digest, launch.regions, launch.vmsas, answer)

    def notes(self) -> list[str]:
        """What a person should know after a run, one sentence each."""
        notes = self.devices.notes()
        if self.dispatcher.refused:
            notes.append(f"{self.dispatcher.refused} hypercalls of the guest were refused, the last one: {self.dispatcher.last_refusal}")
        return notes

    # -- building ------------------------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        # Released in reverse: vCPUs, VM, memory, system. Memory needs the VM to exist while it is filled, not while it goes.
        system = self._stack.enter_context(_system(self.host, config.dialect))
        most = system.check_extension(caps.KVM_CAP_MAX_VCPUS)
        if config.vcpus > max(most, 1):
            raise Unsupported(f"{config.vcpus} vCPUs, but this host allows {most}", "ask for fewer --vcpus")
        self.vm = vm = system.create_vm(self.type)
        sev: SevLaunch | None = None
        self.memory = GuestMemory(vm, self.map)
        self._stack.callback(self.memory.close)
        self._stack.callback(vm.close)
        if config.type.startswith("sev"):
            from vmm.launch import SevLaunch

            sev = SevLaunch(self.host, vm, config.policy, config.type)
            self._stack.callback(sev.close)
        cpuid = system.supported_cpuid()
        if self.pc is not None:
            self.pc.add_controllers(vm)
            self.pc.add_devices(self.devices, vm)
            self.pc.adjust_cpuid(cpuid)
        elif config.irqchip:
            vm.create_irqchip()
        self._enable_exits(vm, cpuid)
        self._add_memory()
        if sev is not None:
            self._pin(sev)
        self._add_vcpus(vm, cpuid)
        contents = self._load()
        if config.lazy_private:
            self._make_test_area_lazy(vm)
        if sev is not None:
            self._launch(sev, contents)
        backing = GuestMemfdBacking(vm, self.memory) if config.type == "sw-protected" else MapOnly()
        self.converter = Converter(self.map, backing)
        self.dispatcher = Dispatcher(self.memory, self.converter, self.devices)

    def _enable_exits(self, vm: Vm, cpuid: list[kvm_cpuid_entry2]) -> None:
        """Ask for the exits the guests use, and note what the guest may rely on (boot info features)."""
        self.features = boot.FEATURE_MMIO
        if self.config.hypercalls and vm.check_extension(caps.KVM_CAP_EXIT_HYPERCALL) & _HYPERCALL_MASK:
            vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, _HYPERCALL_MASK)
            self.features |= boot.FEATURE_HYPERCALL
        if vm.check_extension(caps.KVM_CAP_X86_USER_SPACE_MSR):
            vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, kvm.KVM_MSR_EXIT_REASON_UNKNOWN)
            self.features |= boot.FEATURE_MSR
        if self.config.type == "sw-protected":
            self.features |= boot.FEATURE_IMPLICIT
        for entry in cpuid:
            if entry.function == _LEAF_KVM_FEATURES and self.features & boot.FEATURE_HYPERCALL:
                entry.eax |= 1 << kvm.KVM_FEATURE_HC_MAP_GPA_RANGE
            elif entry.function == _LEAF_SEV:
                if self.config.type.startswith("sev"):
                    self.c_mask = 1 << (entry.ebx & 0x3F)
                else:  # without the leaf KVM keeps the C-bit reserved, as on a machine that has none
                    entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        if self.config.type.startswith("sev") and not self.c_mask:
            raise Unsupported("this host's CPUID has no leaf 0x8000001F: no C-bit", "use --on model")

    def _add_memory(self) -> None:
        """The memslots; a lazy test area has a slot of its own, without a guest_memfd."""
        private = self.config.type == "sw-protected"
        (_, low), *high = boot.memory_layout(self.config.memory)
        if self.config.lazy_private:
            end = boot.TEST_AREA + boot.TEST_SIZE
            self.memory.add_slot(SLOT_LOW, 0, boot.TEST_AREA, private)
            self.memory.add_slot(SLOT_TEST, boot.TEST_AREA, boot.TEST_SIZE)
            if low > end:
                self.memory.add_slot(SLOT_ABOVE_TEST, end, low - end, private)
        else:
            self.memory.add_slot(SLOT_LOW, 0, low, private)
        for gpa, size in high:
            self.memory.add_slot(SLOT_HIGH, gpa, size, private)

    def _pin(self, sev: SevLaunch) -> None:
        """Pin every memslot; in upm-v7 the call that does so means something else."""
        if self.config.dialect != "upm-v7":
            sev.pin(self.memory)

    def _add_vcpus(self, vm: Vm, cpuid: list[kvm_cpuid_entry2]) -> None:
        for index in range(self.config.vcpus):
            vcpu = self._stack.enter_context(vm.create_vcpu(index))
            self.vcpus.append(vcpu)
            vcpu.set_cpuid2(_for_vcpu(cpuid, index, self.config.vcpus))
            if self.pc is not None:
                self.pc.start(vcpu, index)
                continue
            sregs = vcpu.get_sregs()
            boot.set_system_registers(sregs, index, self.config.vcpus)
            vcpu.set_sregs(sregs)
            regs = kvm_regs()  # not the reset values: KVM's RDX says which processor it is, and would be measured with SEV-ES
            boot.set_registers(regs, self.config.image.entry, index)
            vcpu.set_regs(regs)
            if self.config.type == "sev-es":
                from kvmapi.vmsa import build_vmsa

                self._areas.append(build_vmsa(regs, sregs))

    def _load(self) -> dict[int, bytes | memoryview]:
        """Write image and boot pages; returns everything the guest starts with, by GPA (of a foreign guest: nothing)."""
        config = self.config
        if self.pc is not None:
            written = self.pc.pages()
            for gpa, data in [*written.items(), *((segment.gpa, segment.data) for segment in config.image.segments)]:
                self.memory.write(gpa, data)
            return {}
        info = boot.BootInfo(self.type, self.c_mask, config.memory, config.vcpus, self.features, config.arguments)
        contents = boot.contents(info, config.image)
        for gpa, piece in contents.items():
            for at in range(0, len(piece), boot.LARGE):  # memory.write copies what it is given
                self.memory.write(gpa + at, piece[at : at + boot.LARGE])
        return contents

    def _launch(self, sev: SevLaunch, contents: dict[int, bytes | memoryview]) -> None:
        """The measured launch. A guest whose measurement is wrong stays unfinished and cannot run (`Machine.run` says so)."""
        from vmm.launch import mark_private

        config = self.config
        self.launch = sev.run(self.memory, contents, self._areas, secret=config.secret, record=config.record, progress=config.progress)
        mark_private(self.map, self.memory, boot.ghcb_pages(self.type, config.vcpus))

    def _make_test_area_lazy(self, vm: Vm) -> None:
        vm.set_memory_attributes(boot.TEST_AREA, boot.TEST_SIZE, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        self.map.set_range(boot.TEST_AREA, boot.TEST_SIZE, private=True)


def _system(host: Host, dialect: str) -> System:
    """/dev/kvm of the host; of a dialect, with its numbers."""
    from kvmapi import dialects, system

    return system.System(host) if dialect == "mainline" else dialects.System(host, dialect)


def _pc(config: MachineConfig) -> Pc | None:
    """The PC around a foreign guest, None for one of our own contract, which does not pay for the import."""
    if config.image.protocol == SEVMM:
        return None
    from vmm.foreign import Pc

    return Pc(config.image, config.memory, config.vcpus, config.arguments)


def _for_vcpu(cpuid: list[kvm_cpuid_entry2], index: int, count: int) -> list[kvm_cpuid_entry2]:
    """CPUID as vCPU `index` sees it: its own APIC id in leaf 1 and in the topology leaves."""
    for entry in cpuid:
        if entry.function == 1:
            entry.ebx = entry.ebx & 0xFFFF | index << 24 | count << 16
        elif entry.function in (0xB, 0x1F):
            entry.edx = index
    return cpuid
