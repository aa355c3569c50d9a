"""Exits of architectures other than x86: a trace or a recording may hold them, and the numbers are one space."""

from __future__ import annotations

from dataclasses import dataclass

from kvmapi.abi import kvm
from kvmapi.exit_types import Exit


@dataclass(frozen=True, slots=True)
class S390Sieic(Exit):
    """s390: an intercepted instruction."""

    REASON = kvm.KVM_EXIT_S390_SIEIC
    icptcode: int
    ipa: int
    ipb: int


@dataclass(frozen=True, slots=True)
class S390Reset(Exit):
    """s390: reset."""

    REASON = kvm.KVM_EXIT_S390_RESET
    flags: int


@dataclass(frozen=True, slots=True)
class Dcr(Exit):
    """PowerPC: device control register (deprecated)."""

    REASON = kvm.KVM_EXIT_DCR
    dcrn: int
    data: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Osi(Exit):
    """PowerPC: OSI call with its 32 general registers."""

    REASON = kvm.KVM_EXIT_OSI
    gprs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PaprHcall(Exit):
    """PowerPC: hypercall with nine arguments."""

    REASON = kvm.KVM_EXIT_PAPR_HCALL
    nr: int
    ret: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class S390Ucontrol(Exit):
    """s390: fault of a user-controlled VM."""

    REASON = kvm.KVM_EXIT_S390_UCONTROL
    trans_exc_code: int
    pgm_code: int


@dataclass(frozen=True, slots=True)
class Watchdog(Exit):
    """PowerPC: the watchdog expired."""

    REASON = kvm.KVM_EXIT_WATCHDOG


@dataclass(frozen=True, slots=True)
class S390Tsch(Exit):
    """s390: TEST SUBCHANNEL."""

    REASON = kvm.KVM_EXIT_S390_TSCH
    subchannel_id: int
    subchannel_nr: int
    io_int_parm: int
    io_int_word: int
    ipb: int
    dequeued: int


@dataclass(frozen=True, slots=True)
class Epr(Exit):
    """PowerPC: external proxy."""

    REASON = kvm.KVM_EXIT_EPR
    epr: int


@dataclass(frozen=True, slots=True)
class S390Stsi(Exit):
    """s390: STORE SYSTEM INFORMATION."""

    REASON = kvm.KVM_EXIT_S390_STSI
    addr: int
    ar: int
    fc: int
    sel1: int
    sel2: int


@dataclass(frozen=True, slots=True)
class ArmNisv(Exit):
    """arm64: a fault without instruction syndrome."""

    REASON = kvm.KVM_EXIT_ARM_NISV
    esr_iss: int
    fault_ipa: int


@dataclass(frozen=True, slots=True)
class RiscvSbi(Exit):
    """RISC-V: SBI call with six arguments."""

    REASON = kvm.KVM_EXIT_RISCV_SBI
    extension_id: int
    function_id: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RiscvCsr(Exit):
    """RISC-V: access to a control register."""

    REASON = kvm.KVM_EXIT_RISCV_CSR
    csr_num: int
    new_value: int
    write_mask: int
    ret_value: int


@dataclass(frozen=True, slots=True)
class LoongarchIocsr(Exit):
    """LoongArch: access to an I/O control register."""

    REASON = kvm.KVM_EXIT_LOONGARCH_IOCSR
    phys_addr: int
    length: int
    is_write: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class ArmSea(Exit):
    """arm64: synchronous external abort."""

    REASON = kvm.KVM_EXIT_ARM_SEA
    flags: int
    esr: int
    gva: int
    gpa: int


@dataclass(frozen=True, slots=True)
class ArmLdst64b(Exit):
    """arm64: a 64-byte load or store."""

    REASON = kvm.KVM_EXIT_ARM_LDST64B
    esr_iss: int
    fault_ipa: int
