"""CPUID: what the modelled CPU offers (KVM_GET_SUPPORTED_CPUID) and what the guest reads (KVM_SET_CPUID2).

The model offers what its engine executes: x86-64 with SSE4.2 and without AVX; the SEV leaf stands where the platform
has SEV. A guest reads exactly the table that user space set, with AMD's rule that an absent leaf reads as zeroes.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmapi.abi import kvm
from kvmapi.model.cpu import fpu

INDEXED = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX


class Leaf(NamedTuple):
    """One row: function, subleaf (KVM's `index`), flags and the four registers."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def _text(text: str) -> tuple[int, ...]:
    return tuple(int.from_bytes(text.encode()[at : at + 4], "little") for at in range(0, len(text), 4))


_VENDOR = _text("AuthenticAMD")
_SIGNATURE = _text("KVMKVMKVM\0\0\0")
_BRAND = _text("sevmm software model CPU".ljust(48, "\0"))
# leaf 1: SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 x2APIC MOVBE POPCNT TSC-deadline AES XSAVE RDRAND, hypervisor
_1_ECX = 1 << 0 | 1 << 1 | 1 << 9 | 1 << 13 | 0x1F << 19 | 1 << 24 | 1 << 25 | 1 << 26 | 1 << 30 | 1 << 31
# FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
_1_EDX = 0x0F8BFBFF & ~(1 << 18 | 1 << 20) | 1 << 24 | 1 << 25 | 1 << 26
_7_EBX = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 20  # FSGSBASE TSC_ADJUST SMEP SMAP; not BMI1 and BMI2: the engine gets BEXTR, BZHI and BLSI wrong
_X1_ECX = 1 << 0 | 1 << 5  # LAHF ABM
_X1_EDX = (_1_EDX & 0x0183F3FF) | 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29  # SYSCALL NX 1G pages RDTSCP LM
KVM_LEAF, KVM_FEATURES = 0x40000000, 0x40000001
_PV_FEATURES = (
    1 << kvm.KVM_FEATURE_CLOCKSOURCE | 1 << kvm.KVM_FEATURE_NOP_IO_DELAY | 1 << kvm.KVM_FEATURE_CLOCKSOURCE2
    | 1 << kvm.KVM_FEATURE_POLL_CONTROL | 1 << kvm.KVM_FEATURE_PV_SCHED_YIELD | 1 << kvm.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
)  # fmt: skip
_STEAL_TIME = 1 << kvm.KVM_FEATURE_STEAL_TIME
SEV_LEAF = 0x8000001F
FAMILY_MODEL = 0x00800F12  # an EPYC of the first generation
MAX_PHYS_BITS = 48
MWAIT, HYPERVISOR = 1 << 3, 1 << 31  # leaf 1 ECX
SVM, SVM_LEAF = 1 << 2, 0x8000000A  # leaf 0x80000001 ECX; and what the processor can do for KVM
SVM_REVISION, SVM_FEATURES = 1, 1 << 0 | 1 << 3  # nested paging and saved next RIPs, without which there is no SEV
OSXSAVE = 1 << 27  # leaf 1 ECX: follows CR4.OSXSAVE while the guest runs
XSAVE_BYTES = fpu.FXSAVE_SIZE + 64  # legacy area and header: the model has no component beyond x87 and SSE


def supported(sev_eax: int, c_bit: int, asids: int, min_sev_asid: int, *, steal_time: bool = False) -> list[Leaf]:
    """The table of KVM_GET_SUPPORTED_CPUID. `sev_eax` is 0 on a platform without SEV; then the SEV leaf is all
    zeroes, as KVM leaves it. `steal_time`: this machine's kernel counts what that is made of.
    """
    rows = [
        Leaf(0, 0, 0, 0xD, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
        Leaf(1, 0, 0, FAMILY_MODEL, 0x00000800, _1_ECX, _1_EDX),
        Leaf(7, 0, INDEXED, 0, _7_EBX, 0, 0),
        Leaf(0xD, 0, INDEXED, fpu.SUPPORTED, XSAVE_BYTES, XSAVE_BYTES, 0),
        Leaf(0xD, 1, INDEXED, 0, 0, 0, 0),
        Leaf(KVM_LEAF, 0, 0, KVM_FEATURES, *_SIGNATURE),
        Leaf(KVM_FEATURES, 0, 0, _PV_FEATURES | (_STEAL_TIME if steal_time else 0), 0, 0, 0),
        Leaf(0x80000000, 0, 0, SEV_LEAF, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
        Leaf(0x80000001, 0, 0, FAMILY_MODEL, 0, _X1_ECX, _X1_EDX),
    ]
    rows += [Leaf(0x80000002 + n, 0, 0, *_BRAND[4 * n : 4 * n + 4]) for n in range(3)]
    rows.append(Leaf(0x80000008, 0, 0, 48 << 8 | MAX_PHYS_BITS, 0, 0, 0))
    # KVM clears bits 31:6 of EBX; the C-bit stays.
    rows.append(Leaf(SEV_LEAF, 0, 0, sev_eax, c_bit & 0x3F, asids, min_sev_asid) if sev_eax else Leaf(SEV_LEAF, 0, 0, 0, 0, 0, 0))
    return rows


# Control register bits that exist only where CPUID says so, of those the engine has: bit, function, register, its bit.
CR4_ALWAYS = 0x7FF  # VME to OSXMMEXCPT
_CR4_OFFERED = ((16, 7, "ebx", 0), (18, 1, "ecx", 26), (20, 7, "ebx", 7), (21, 7, "ebx", 20))  # FSGSBASE OSXSAVE SMEP SMAP
EFER_SUPPORTED = 1 | 1 << 8 | 1 << 10 | 1 << 11  # SCE LME LMA NXE
_EFER_OFFERED = ((8, 0x80000001, "edx", 29), (10, 0x80000001, "edx", 29), (11, 0x80000001, "edx", 20))


class Table:
    """What one vCPU's CPUID instruction returns."""

    def __init__(self, rows: list[Leaf]) -> None:
        self.rows = rows
        self._indexed = {(row.function, row.subleaf): row for row in rows if row.flags & INDEXED}
        self._plain = {row.function: row for row in rows if not row.flags & INDEXED}
        self.cr4_valid = CR4_ALWAYS | self._offered(_CR4_OFFERED)
        self.efer_valid = 1 | self._offered(_EFER_OFFERED)
        self.x2apic = bool(self._offered(((0, 1, "ecx", 21),)))
        self.tsc_aux = bool(self._offered(((0, 0x80000001, "edx", 27), (0, 7, "ecx", 22))))  # RDTSCP or RDPID
        self.sse3 = bool(self._offered(((0, 1, "ecx", 0),)))
        self.mwait = bool(self._offered(((0, 1, "ecx", 3),)))
        self.pv_features = self._pv_features()
        self.tsc_deadline = bool(self._offered(((0, 1, "ecx", 24),)))
        self.tsc_adjust = bool(self._offered(((0, 7, "ebx", 1),)))

    def _offered(self, bits: tuple[tuple[int, int, str, int], ...]) -> int:
        """The control register bits that this table offers."""
        found = 0
        for bit, function, register, at in bits:
            row = self._plain.get(function) or self._indexed.get((function, 0))
            if row is not None and getattr(row, register) >> at & 1:
                found |= 1 << bit
        return found

    def _pv_features(self) -> int:
        """KVM's feature bits in the leaf behind the one that has its signature; 0 where there is none."""
        for base in range(KVM_LEAF, KVM_LEAF + 0x10000, 0x100):
            row = self._plain.get(base)
            if row is not None and row[4:7] == _SIGNATURE:
                features = self._plain.get(base | 1)
                return features.eax if features is not None else 0
        return 0

    def read(self, function: int, index: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX, as user space set them; runtime_cpuid.py has them as they are."""
        row = self.find(function, index)
        return row[3:7] if row is not None else (0, 0, 0, 0)

    def find(self, function: int, index: int) -> Leaf | None:
        """The row that answers; None for an absent leaf."""
        return self._plain.get(function) or self._indexed.get((function, index))

    def has(self, function: int) -> bool:
        return self.read(function, 0) != (0, 0, 0, 0)
