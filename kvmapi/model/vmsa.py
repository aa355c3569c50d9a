"""The VMSA of a vCPU of the model: what LAUNCH_UPDATE_VMSA measures, made from the engine's registers.

KVM copies what stands in the VMCB's save area, so segments go in as they were set, not as KVM_GET_SREGS shows them, and
what KVM keeps elsewhere (CR2, DR0-DR3, TSC_AUX) does not go in. The rules are in `kvmapi.vmsa`, which the owner uses too;
here is only where the model has each register. Source: sev_es_sync_vmsa (7.3).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.abi.vcpu import kvm_regs, kvm_segment, kvm_sregs
from kvmapi.model.cpu import fpu
from kvmapi.model.cpu.msrs import NoSuchMsr
from kvmapi.model.cpu.sregs import cr0
from kvmapi.model.cpu.state import CS, DS, ES, F_DB, F_DPL_SHIFT, F_G, F_L, F_P, F_S, FS, GDT, GS, IDT, LDT, SS, TR, Segment
from kvmapi.vmsa import MSRS, build_vmsa

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.vcpu import VcpuFile

_SEGMENTS = (("cs", CS), ("ds", DS), ("es", ES), ("fs", FS), ("gs", GS), ("ss", SS), ("tr", TR), ("ldt", LDT))
_AVL = 1 << 20


def of(vcpu: VcpuFile) -> bytes:
    """The 4096 bytes. The vCPU is outside KVM_RUN and its mutex held."""
    cpu, vm = vcpu.cpu, vcpu.vm
    dr6, dr7 = struct.unpack_from("<QQ", cpu.native.state, cpu.where.debug + 48)
    return build_vmsa(
        kvm_regs.from_buffer_copy(vcpu.state.pack_regs()),
        _system_registers(cpu),
        fpu.to_xsave(fpu.save(cpu)),  # every component counts as present: KVM copies the area, not what its header says
        init2=vm.type != kvm.KVM_X86_DEFAULT_VM,
        sev_features=vm.sev.vmsa_features,
        xcr0=struct.unpack_from("<Q", cpu.native.state, cpu.where.xcr0)[0],
        dr6=dr6,
        dr7=dr7,
        msrs=known_msrs(cpu),
    )


def known_msrs(cpu: Cpu) -> dict[int, int]:
    """The MSRs with a place in a VMSA that the modelled CPU has."""
    found = {}
    for number in MSRS:
        try:
            found[number] = cpu.msrs.read(number, host=True)
        except NoSuchMsr:
            continue
    return found


def _system_registers(cpu: Cpu) -> kvm_sregs:
    """As they were set, with what KVM_GET_SREGS makes up left out."""
    registers = cpu.registers
    sregs = kvm_sregs(cr0=cr0(cpu), cr3=registers.cr(3), cr4=registers.cr(4), efer=registers.efer)
    for name, number in _SEGMENTS:
        setattr(sregs, name, _segment(registers.segment(number)))
    for table, number in ((sregs.gdt, GDT), (sregs.idt, IDT)):
        segment = registers.segment(number)
        table.base, table.limit = segment.base, segment.limit & 0xFFFF
    return sregs


def _segment(segment: Segment) -> kvm_segment:
    selector, base, limit, flags = segment
    return kvm_segment(
        base=base,
        limit=limit,
        selector=selector,
        type=flags >> 8 & 15,
        s=bool(flags & F_S),
        dpl=flags >> F_DPL_SHIFT & 3,
        present=bool(flags & F_P),
        avl=bool(flags & _AVL),
        l=bool(flags & F_L),
        db=bool(flags & F_DB),
        g=bool(flags & F_G),
    )
