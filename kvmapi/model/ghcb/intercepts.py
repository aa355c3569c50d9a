"""The guest's side of an SEV-ES vCPU: which instructions raise #VC instead of leaving KVM_RUN, and which execute.

KVM intercepts as for any guest, but the processor tells the guest and not the hypervisor: vector 29 with the exit code as the
error code. What the instruction would fault for before it is intercepted (privilege, the port bitmap) it faults for. HLT leaves
by itself, writes of CR0, CR4, CR8 and EFER execute and are only reported to KVM, and MSRs that the processor swaps with the
guest's registers are the guest's own. Not intercepted, as of any guest of kvm_amd: RDTSC, RDTSCP, INVLPG, MOV CR3, XSETBV.

A GPA without memory is #VC with the code of a nested page fault, for data and for code. So are #DB and #AC, which KVM
intercepts, with their own codes; with the VMSA's DebugSwap DR7 and #DB are the guest's.

Source: init_vmcb, svm_recalc_msr_intercepts, sev_es_init_vmcb and sev_es_recalc_msr_intercepts in arch/x86/kvm/svm/ (7.3);
AMD64 Architecture Programmer's Manual volume 2, 15.35 (SEV-ES) and table 15-7 (what comes before an intercept).
"""

from __future__ import annotations

import re

from kvmapi.abi import ghcb as abi
from kvmapi.abi import kvm
from kvmapi.model.cpu import control, hazards, msrs, ports
from kvmapi.model.cpu.mmu import Fault
from kvmapi.model.cpu.msrs import NoSuchMsr
from kvmapi.model.cpu.scan import Site
from kvmapi.model.ghcb.unit import BRANCH_RECORDS, GhcbUnit

_RAX, _RCX, _RDX = 0, 1, 2
_DB, _UD, _GP, _AC = 1, 6, 13, 17
_U32, _U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_CR4_DE, _CR4_PCE = 1 << 3, 1 << 8
_EFER_SVME = 1 << 12  # always set while a guest runs; writes do not change it
_SEV, _SEV_ES, _DEBUG_SWAP = 1 << 0, 1 << 1, 1 << 7  # in SEV_STATUS
OWN_MSRS = frozenset(
    (
        msrs.EFER, msrs.PAT, msrs.STAR, msrs.LSTAR, msrs.CSTAR, msrs.SFMASK, msrs.FS_BASE, msrs.GS_BASE, msrs.KERNEL_GS_BASE,
        msrs.SYSENTER_CS, msrs.SYSENTER_ESP, msrs.SYSENTER_EIP, abi.MSR_AMD64_SEV_ES_GHCB, *BRANCH_RECORDS,
    )
)  # fmt: skip
"""The MSRs that an SEV-ES guest accesses without KVM, unless a filter keeps it from them."""

_INTERCEPTED = re.compile(rb"\x0f[\x08\x09\x33]")
_KINDS = {0x08: "invd", 0x09: "wbinvd", 0x33: "rdpmc"}
_VMMCALL = b"\x0f\x01\xd9"
_SVM_CODES = {  # third byte of 0F 01: exit code. They need CPL 0.
    0xD8: abi.SVM_EXIT_VMRUN, 0xDA: abi.SVM_EXIT_VMLOAD, 0xDB: abi.SVM_EXIT_VMSAVE, 0xDC: abi.SVM_EXIT_STGI,
    0xDD: abi.SVM_EXIT_CLGI, 0xDE: abi.SVM_EXIT_SKINIT, 0xDF: abi.SVM_EXIT_INVLPGA,
}  # fmt: skip


def find(code: bytes | bytearray, usable: int, bits: int, sites: dict[int, Site]) -> None:
    """Add what must stop the engine in an SEV-ES guest only: INVD, WBINVD and RDPMC."""
    for match in _INTERCEPTED.finditer(code):
        kind = _KINDS[code[match.start() + 1]]
        for start in hazards.starts(code, match.start(), usable, bits):
            sites.setdefault(start, Site(kind, match.end() - start))


class Intercepts:
    """What raises #VC in one vCPU. `install` puts it in the place of what leaves KVM_RUN."""

    def __init__(self, unit: GhcbUnit, debug_swap: bool) -> None:
        self._unit = unit
        self._cpu = unit.cpu
        self._registers = unit.cpu.registers
        self._policy = unit.policy
        self._debug_swap = debug_swap
        self._status = _SEV | _SEV_ES | (_DEBUG_SWAP if debug_swap else 0)

    def install(self) -> None:
        """From now on the vCPU runs an SEV-ES guest."""
        cpu = self._cpu
        privileged = {
            **dict.fromkeys(("out", "in", "outs", "ins"), self._io),
            "cpuid": self._cpuid,
            "rdmsr": self._rdmsr,
            "wrmsr": self._wrmsr,
            "mov_to_cr": self._mov_to_cr,
            "mov_to_dr": self._mov_to_dr,
            "mov_from_dr": self._mov_from_dr,
            "rdpmc": self._rdpmc,
            **dict.fromkeys(("invd", "wbinvd"), self._cache),
            **dict.fromkeys(("monitor", "mwait"), self._monitor),
            "vmmcall": self._vmmcall,
        }
        cpu.privileged.replace(privileged)
        cpu.intercepts = self
        cpu.events.iret_unmasks = False
        cpu.code.more = find
        cpu.code.flush()

    def raise_vc(self, exit_code: int) -> int | None:
        """#VC: None to go on in its handler, or KVM_RUN's result when the guest cannot take it."""
        return self._cpu.raise_in_guest(abi.X86_TRAP_VC, exit_code)

    def no_memory(self) -> int | None:
        """An access to a GPA where no memory is. KVM marks such pages so that the processor need not ask."""
        return self.raise_vc(abi.SVM_EXIT_NPF)

    # ---- what the engine reports
    def exception(self, vector: int) -> int | None:
        """The exit code of an exception that KVM intercepts; None of one that is the guest's own."""
        if vector == _AC or (vector == _DB and not self._debug_swap):
            return abi.SVM_EXIT_EXCP_BASE + vector
        return None

    def invalid_opcode(self, code: bytes) -> int | None:
        """The engine does not know this instruction. Raises Fault(#UD) where a processor does not, either."""
        prefixed = code[:1] in (b"\xf2", b"\xf3", b"\x66")
        if code[:1] in (b"\xf2", b"\xf3") and code[1:4] == _VMMCALL:
            return self._unit.vmgexit(4)
        body = code[1:4] if prefixed else code[:3]
        if body == _VMMCALL:
            return self.raise_vc(abi.SVM_EXIT_VMMCALL)
        exit_code = _SVM_CODES.get(body[2]) if body[:2] == b"\x0f\x01" and len(body) == 3 else None
        if exit_code is None:
            raise Fault(_UD, None)
        if self._registers.cpl:
            raise Fault(_GP, 0)
        return self.raise_vc(exit_code)

    # ---- instructions, found by the scan
    def _io(self, site: Site) -> int | None:
        registers = self._registers
        if registers.cpl:
            port = registers.gpr(_RDX) & 0xFFFF if site.port is None else site.port
            if not ports.allowed(registers, self._cpu.mmu, port, site.size):
                raise Fault(_GP, 0)
        return self.raise_vc(abi.SVM_EXIT_IOIO)

    def _cpuid(self, site: Site) -> int | None:
        return self.raise_vc(abi.SVM_EXIT_CPUID)

    def _mov_to_cr(self, site: Site) -> None:
        """As a processor executes it; KVM is told afterwards, and nothing leaves KVM_RUN."""
        cpu, registers = self._cpu, self._registers
        value = registers.gpr(site.register) & (_U64 if registers.long_mode else _U32)
        if registers.cpl or not control.write(cpu, site.control, value, cpu.cpuid.cr4_valid):
            raise Fault(_GP, 0)
        cpu.privileged.advance(site.length)
        cpu.attention = True  # CR8 may let an interrupt through

    def _names_dr7(self, site: Site) -> bool:
        """Is it DR7, if need be by its other name? Raises Fault."""
        if self._registers.cpl:
            raise Fault(_GP, 0)
        if site.control in (4, 5) and self._registers.cr(4) & _CR4_DE:
            raise Fault(_UD, None)
        return site.control in (5, 7)

    def _mov_to_dr(self, site: Site) -> int | None:
        if self._names_dr7(site) and not self._debug_swap:
            return self.raise_vc(abi.SVM_EXIT_WRITE_DR7)
        return control.mov_to_dr(self._cpu, site)

    def _mov_from_dr(self, site: Site) -> int | None:
        if self._names_dr7(site) and not self._debug_swap:
            return self.raise_vc(abi.SVM_EXIT_READ_DR7)
        return control.mov_from_dr(self._cpu, site)

    def _rdpmc(self, site: Site) -> int | None:
        if self._registers.cpl and not self._registers.cr(4) & _CR4_PCE:
            raise Fault(_GP, 0)
        return self.raise_vc(abi.SVM_EXIT_RDPMC)

    def _cache(self, site: Site) -> int | None:
        if self._registers.cpl:
            raise Fault(_GP, 0)
        return self.raise_vc(abi.SVM_EXIT_INVD if site.kind == "invd" else abi.SVM_EXIT_WBINVD)

    def _monitor(self, site: Site) -> int | None:
        if self._registers.cpl:
            raise Fault(_UD, None)
        return self.raise_vc(abi.SVM_EXIT_MONITOR if site.kind == "monitor" else abi.SVM_EXIT_MWAIT)

    def _vmmcall(self, site: Site) -> int | None:
        """VMMCALL, and with a repeat prefix VMGEXIT."""
        return self.invalid_opcode(self._cpu.code.bytes_at(self._registers.linear_rip, 4))

    # ---- MSRs
    def _own(self, number: int, access: int) -> bool:
        """Does the guest access it without KVM?"""
        allowed = self._policy.msr_filter
        return number in OWN_MSRS and (allowed is None or allowed.allows(number, access))

    def _rdmsr(self, site: Site) -> int | None:
        registers = self._registers
        number = registers.gpr(_RCX) & _U32
        if registers.cpl:
            raise Fault(_GP, 0)
        if number != msrs.SEV_STATUS and not self._own(number, kvm.KVM_MSR_FILTER_READ):
            return self.raise_vc(abi.SVM_EXIT_MSR)
        try:
            value = self._read(number)
        except NoSuchMsr:
            raise Fault(_GP, 0) from None
        registers.set_gpr(_RAX, value & _U32)
        registers.set_gpr(_RDX, value >> 32 & _U32)
        self._cpu.privileged.advance(site.length)
        return None

    def _read(self, number: int) -> int:
        if number == abi.MSR_AMD64_SEV_ES_GHCB:
            return self._unit.msr
        if number in self._unit.branches:
            return self._unit.branches[number]
        if number == msrs.SEV_STATUS:  # whatever its CPUID says
            return self._status
        value = self._cpu.msrs.read(number)
        return value | _EFER_SVME if number == msrs.EFER else value

    def _wrmsr(self, site: Site) -> int | None:
        registers = self._registers
        number = registers.gpr(_RCX) & _U32
        if registers.cpl:
            raise Fault(_GP, 0)
        if not self._own(number, kvm.KVM_MSR_FILTER_WRITE):
            return self.raise_vc(abi.SVM_EXIT_MSR)
        value = registers.gpr(_RAX) & _U32 | (registers.gpr(_RDX) & _U32) << 32
        if number == abi.MSR_AMD64_SEV_ES_GHCB:
            self._unit.msr = value
        elif number in self._unit.branches:
            self._unit.branches[number] = value
        else:
            try:
                self._cpu.msrs.write(number, value & ~_EFER_SVME if number == msrs.EFER else value)
            except NoSuchMsr:
                raise Fault(_GP, 0) from None
        self._cpu.privileged.advance(site.length)
        return None
