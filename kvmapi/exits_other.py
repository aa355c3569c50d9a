"""Decoders for the exits of architectures other than x86; `kvmapi.exits` loads them when it meets one."""

from __future__ import annotations

from collections.abc import Callable

from kvmapi import exit_types_other as o
from kvmapi.abi import kvm
from kvmapi.exit_types import Exit
from kvmapi.exits import Mapping, access, constant, plain

DECODERS: dict[int, Callable[[Mapping], Exit]] = {
    kvm.KVM_EXIT_S390_SIEIC: plain(o.S390Sieic, "BxHI"),
    kvm.KVM_EXIT_S390_RESET: plain(o.S390Reset, "Q"),
    kvm.KVM_EXIT_DCR: plain(lambda dcrn, data, write: o.Dcr(dcrn, data, bool(write)), "IIB"),
    kvm.KVM_EXIT_OSI: plain(lambda *gprs: o.Osi(gprs), "32Q"),
    kvm.KVM_EXIT_PAPR_HCALL: plain(lambda nr, ret, *args: o.PaprHcall(nr, ret, args), "11Q"),
    kvm.KVM_EXIT_S390_UCONTROL: plain(o.S390Ucontrol, "QI"),
    kvm.KVM_EXIT_WATCHDOG: constant(o.Watchdog()),
    kvm.KVM_EXIT_S390_TSCH: plain(o.S390Tsch, "HHIIIB"),
    kvm.KVM_EXIT_EPR: plain(o.Epr, "I"),
    kvm.KVM_EXIT_S390_STSI: plain(o.S390Stsi, "QBxBBH"),
    kvm.KVM_EXIT_ARM_NISV: plain(o.ArmNisv, "QQ"),
    kvm.KVM_EXIT_RISCV_SBI: plain(lambda ext, func, *args: o.RiscvSbi(ext, func, args), "8Q"),
    kvm.KVM_EXIT_RISCV_CSR: plain(o.RiscvCsr, "QQQQ"),
    kvm.KVM_EXIT_LOONGARCH_IOCSR: lambda run: o.LoongarchIocsr(*access(run)),
    kvm.KVM_EXIT_ARM_SEA: plain(o.ArmSea, "QQQQ"),
    kvm.KVM_EXIT_ARM_LDST64B: plain(o.ArmLdst64b, "QQ"),
}
