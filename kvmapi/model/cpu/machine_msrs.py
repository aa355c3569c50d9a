"""MSRs that are values of KVM's own: features, identification, and what old guests poke at.

Nothing the engine does depends on them. Some hold what was written, under rules; some read as a constant, because a
guest for that processor would not start without; writes of some are dropped. Source: kvm_set_msr_common and
kvm_get_msr_common in arch/x86/kvm/msrs.c, svm_set_msr in svm/svm.c, mtrr.c (7.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.cpu.mce import NUMBERS as MCE_NUMBERS
from kvmapi.model.cpu.mce import ONLY_READ as MCE_ONLY_READ
from kvmapi.model.cpu.mce import MachineChecks
from kvmapi.model.cpu.state import MAX_PHYS_BITS

if TYPE_CHECKING:
    from kvmapi.model.cpu.policy import ExitPolicy

UCODE_REV, PLATFORM_INFO, MISC_FEATURES, POWER_CTL, MISC_ENABLE = 0x8B, 0xCE, 0x140, 0x1FC, 0x1A0
ARCH_CAPABILITIES, PERF_CAPABILITIES = 0x10A, 0x345
HWCR, DE_CFG = 0xC0010015, 0xC0011029
CPUID_FAULT = 1  # of MISC_FEATURES: CPUID is #GP in user code
CAN_FAULT_CPUID = 1 << 31  # of PLATFORM_INFO
ENABLE_MWAIT = 1 << 18  # of MISC_ENABLE
FEATURES = {DE_CFG: 2, UCODE_REV: 0x01000065, ARCH_CAPABILITIES: 0, PERF_CAPABILITIES: 0, PLATFORM_INFO: CAN_FAULT_CPUID}
"""Features that a CPU tells in MSRs, KVM's list on AMD: LFENCE serializes (DE_CFG), the microcode's number, no
ARCH_CAPABILITIES and no PERF_CAPABILITIES, CPUID faulting (PLATFORM_INFO).
"""

_NO_BTS_NO_PEBS, _PERFORMANCE_MONITOR = 1 << 11 | 1 << 12, 1 << 7
_HWCR_VALID, _HWCR_IGNORED = 1 << 18 | 1 << 24, 1 << 3 | 1 << 6 | 1 << 8
MC_STATUS_WRITABLE = 1 << 18
MTRR_CAP, MTRR_DEF = 0xFE, 0x2FF
_MTRR_TYPES = frozenset((0, 1, 4, 5, 6))
_MTRR_VARIABLE = range(0x200, 0x210)
_MTRR_FIXED = frozenset((0x250, 0x258, 0x259, *range(0x268, 0x270)))
_K7_COUNTERS = range(0xC0010000, 0xC0010008)
_NO_ADDRESS = ((1 << 64) - 1) & ~((1 << MAX_PHYS_BITS) - 1)
_CONSTANTS = {
    **dict.fromkeys((0x17, 0x2A), 0),  # PLATFORM_ID, EBL_CR_POWERON
    0x2C: 1 << 24,  # EBC_FREQUENCY_ID
    0xCD: 3,  # frequency of the front side bus
    **dict.fromkeys((0xC1, 0xC2, 0x186, 0x187), 0),  # counters of a Pentium Pro
    0x11E: 0xBE702111,  # BBL_CR_CTL3
    0x198: 1000 | 4 << 40,  # PERF_STATUS
    0x199: 0,  # PERF_CTL
    **dict.fromkeys((0x606, 0x611, 0x619, 0x639, 0x641), 0),  # RAPL
    **dict.fromkeys((0xC0010010, 0xC001001F, 0xC0010055, 0xC0010058, 0xC0010112, 0xC0010113), 0),  # SYSCFG to TSEG_MASK
    0xC001001B: 0x20000000,  # K7_CLK_CTL
    **dict.fromkeys((0xC0011022, 0xC0011023, 0xC001102A, 0xC001102C), 0),  # DC_CFG TW_CFG BU_CFG2 EX_CFG
}
_DROPPED = frozenset(
    (
        0x79, 0xC1, 0xC2, 0x186, 0x187, 0x11E,  # UCODE_WRITE, counters, BBL_CR_CTL3
        0xC001001B, 0xC001001F, 0xC0010020, 0xC0011022, 0xC0011023, 0xC001102A, 0xC001102C,
    )
)  # fmt: skip
_ONLY_ZERO = 0xC0010058  # MMIO_CONF_BASE
_HELD = {
    MISC_ENABLE: _NO_BTS_NO_PEBS, MISC_FEATURES: 0, POWER_CTL: 0, UCODE_REV: 0, PLATFORM_INFO: 0, HWCR: 0, DE_CFG: 0,
    MTRR_DEF: 0, **dict.fromkeys((*_MTRR_VARIABLE, *_MTRR_FIXED), 0),
    **dict.fromkeys(_K7_COUNTERS, 0),  # KVM takes them without a PMU: guests of 2000 write to them
}  # fmt: skip
READABLE = frozenset((*_HELD, *_CONSTANTS, *MCE_NUMBERS, MTRR_CAP))
WRITABLE = frozenset((*_HELD, *_DROPPED, _ONLY_ZERO, *(MCE_NUMBERS - MCE_ONLY_READ)))


class MachineMsrs:
    """These MSRs of one vCPU."""

    def __init__(self, policy: ExitPolicy) -> None:
        self._policy = policy
        self._values = dict(_HELD)
        if policy.has_quirk(kvm.KVM_X86_QUIRK_STUFF_FEATURE_MSRS):
            self._values[UCODE_REV], self._values[PLATFORM_INFO] = FEATURES[UCODE_REV], FEATURES[PLATFORM_INFO]
        self.checks = MachineChecks()

    @property
    def faults_cpuid(self) -> bool:
        """Is CPUID #GP in user code?"""
        return bool(self._values[MISC_FEATURES] & CPUID_FAULT)

    @property
    def enables_mwait(self) -> bool:
        """MISC_ENABLE's bit for MONITOR and MWAIT."""
        return bool(self._values[MISC_ENABLE] & ENABLE_MWAIT)

    def read(self, number: int, host: bool) -> int | None:
        """The value of one of READABLE; None is #GP."""
        if number in self._values:
            hidden = number == PLATFORM_INFO and not host and not self._policy.reads_platform_info
            return None if hidden else self._values[number]
        if number in MCE_NUMBERS:
            return self.checks.read(number, host)
        return 0x508 if number == MTRR_CAP else _CONSTANTS.get(number)

    def write(self, number: int, value: int, host: bool, has_sse3: bool) -> bool:
        """Set one of WRITABLE; False is #GP. `has_sse3`: of the guest's CPUID, for MISC_ENABLE's MWAIT bit."""
        if number in MCE_NUMBERS:
            return self.checks.write(number, value, host, bool(self._values[HWCR] & MC_STATUS_WRITABLE))
        if number in _DROPPED or (number == _ONLY_ZERO and not value):
            return True
        if number not in self._values:
            return False
        if number == UCODE_REV and not host:
            return True
        if number == MISC_ENABLE:
            return self._write_misc_enable(value, host, has_sse3)
        if number == HWCR:
            value &= ~_HWCR_IGNORED
        if not self._accepts(number, value, host):
            return False
        self._values[number] = value
        return True

    def _write_misc_enable(self, value: int, host: bool, has_sse3: bool) -> bool:
        old = self._values[MISC_ENABLE]
        if not host:
            if (old ^ value) & _NO_BTS_NO_PEBS:
                return False
            value = value & ~_PERFORMANCE_MONITOR | old & _PERFORMANCE_MONITOR
        if (old ^ value) & ENABLE_MWAIT and not has_sse3 and not self._policy.has_quirk(kvm.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):
            return False
        self._values[MISC_ENABLE] = value
        return True

    def _accepts(self, number: int, value: int, host: bool) -> bool:
        if number == PLATFORM_INFO:
            return host
        if number == MISC_FEATURES:
            return not value & ~CPUID_FAULT and (not value or bool(self._values[PLATFORM_INFO] & CAN_FAULT_CPUID))
        if number == HWCR:
            return not value & ~_HWCR_VALID
        if number == DE_CFG:
            return not value & ~FEATURES[DE_CFG]
        if number == MTRR_DEF:
            return not value & ~0xCFF and value & 0xFF in _MTRR_TYPES
        if number in _MTRR_FIXED:
            return all(value >> shift & 0xFF in _MTRR_TYPES for shift in range(0, 64, 8))
        if number in _MTRR_VARIABLE:
            return not value & (_NO_ADDRESS | 0x7FF) if number & 1 else not value & (_NO_ADDRESS | 0xF00) and value & 0xFF in _MTRR_TYPES
        return True
