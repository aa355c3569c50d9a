"""Test support: a launched SEV-ES guest of the model that runs short pieces of machine code.

Nobody can read its registers, so it leaves what matters in shared memory. Below PRIVATE_END everything is private; the guest
sees the pages behind it shared at ALIAS + GPA. Every vector enters a handler that writes a report: vector, then up to four
words of the frame, RAX and RDX; halts; and starts again.

`EsCode(host, text)` runs `text`. `Caller(host)` does what the test says: it writes `msr` into the GHCB MSR, executes VMGEXIT,
leaves the MSR's new value behind, and halts; the GHCB at GHCB_AT is shared memory, which the test fills in and looks at.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

from kvmapi.abi import ghcb as abi
from kvmapi.abi import sev
from kvmapi.exits import Exit, Hlt
from kvmapi.model.host import ModelHost
from kvmapi.model.vcpu import VcpuFile
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import ALIAS, MIB, STUBS, LongGuest, code
from tests.model.es_guest import PLAIN, SEV_ES

C_MASK = 1 << 51
PRIVATE_END, GHCB_AT, REPORT, CELL, SHARED = 0x40000, 0x50000, 0x60000, 0x61000, 0x70000
COMMON = STUBS + 0x400
_HANDLER = code(
    "49bf0000064000000000 418f07 418f4708 418f4710 418f4718 418f4720 49894728 49895730 f4 bc00000200 b800000100 ffe0",
    "movabs r15, 0x40060000; pop [r15]; pop [r15+8]; pop [r15+16]; pop [r15+24]; pop [r15+32]; mov [r15+40], rax; mov [r15+48], rdx; hlt;"
    " mov esp, 0x20000; mov eax, 0x10000; jmp rax",
)
CALLER = code(
    "49be0010064000000000 b9300101c0 418b06 418b5604 0f30 f30f01d9 0f32 41894608 4189560c f4 ebe1",
    "movabs r14, 0x40061000; 0: mov ecx, 0xc0010130; mov eax, [r14]; mov edx, [r14+4]; wrmsr; .byte 0xf3; vmmcall; rdmsr; mov [r14+8], eax;"
    " mov [r14+12], edx; hlt; jmp 0b",
)


class Report(NamedTuple):
    """What a handler left: `words` are the frame from its top, the error code first where there is one."""

    vector: int
    words: tuple[int, int, int, int]
    rax: int
    rdx: int


class EsCode(LongGuest):
    """Launched, ready to run."""

    def __init__(
        self,
        host: ModelHost,
        text: bytes,
        type: int = SEV_ES,
        *,
        vcpus: int = 1,
        version: int = 0,
        features: int = 0,
        irqchip: bool = False,
        registers: dict[str, int] | None = None,
    ) -> None:
        super().__init__(host, text, type, 2 * MIB, c_mask=C_MASK, vcpus=0)
        self.model = host
        self.platform = SevPlatform(host)
        self.closing.append(self.platform)
        for vector in range(32):
            at = STUBS + 16 * vector
            self.put(at, b"\x6a" + bytes((vector,)) + b"\xe9" + struct.pack("<i", COMMON - at - 7))
        self.put(COMMON, _HANDLER)
        if type == PLAIN:
            self.vm.sev_op(sev.KVM_SEV_ES_INIT)
        else:
            self.vm.sev_op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(vmsa_features=features, ghcb_version=version))
        if irqchip:
            self.vm.create_irqchip()
        for number in range(vcpus):
            self.start_long(self.add_vcpu())
            self.regs(number, **(registers or {}))
        self.before_launch()
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start(policy=sev.SEV_POLICY_ES), self.platform.fd)
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_UPDATE_DATA, sev.kvm_sev_launch_update_data(uaddr=self.hva, len=PRIVATE_END))
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA)
        room = (ctypes.c_uint8 * 48)()
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure(ctypes.addressof(room), 48))
        self.vm.sev_op(sev.KVM_SEV_LAUNCH_FINISH)

    def before_launch(self) -> None:
        """For subclasses: vCPUs are there, nothing is encrypted yet."""

    def file(self, number: int = 0) -> VcpuFile:
        """The model's side of a vCPU."""
        file = self.model.file(self.vcpus[number].fd)
        assert isinstance(file, VcpuFile)
        return file

    def report(self) -> Report:
        """What the last handler wrote."""
        vector, *rest = struct.unpack("<7Q", self.get(REPORT, 56))
        return Report(vector, (rest[0], rest[1], rest[2], rest[3]), rest[4], rest[5])

    def words(self, gpa: int, count: int = 1) -> tuple[int, ...]:
        """64-bit words of shared memory."""
        return struct.unpack(f"<{count}Q", self.get(gpa, 8 * count))


class Caller(EsCode):
    """A guest that calls its hypervisor as the test says."""

    def __init__(self, host: ModelHost, type: int = SEV_ES, **options: Any) -> None:
        super().__init__(host, CALLER, type, **options)

    @property
    def ghcb(self) -> abi.ghcb:
        """The page as it is now; what is set in it is set in the guest's memory."""
        return abi.ghcb.from_buffer(self.memory, GHCB_AT)

    def fill(self, exit_code: int, info_1: int = 0, info_2: int = 0, *, at: int = GHCB_AT, **fields: int) -> None:
        """A request: all fields that are given are marked as valid, and everything else is zero."""
        page = abi.ghcb()
        given = {"sw_exit_code": exit_code, "sw_exit_info_1": info_1, "sw_exit_info_2": info_2, **fields}
        valid = 0
        for name, value in given.items():
            setattr(page.save, name, value)
            valid |= 1 << getattr(abi.ghcb_save_area, name).offset // 8
        page.save.valid_bitmap[:] = valid.to_bytes(16, "little")
        shared = bytes(self.get(at + 0x800, 2032))
        self.put(at, bytes(page))
        self.put(at + 0x800, shared)

    def call(self, msr: int = GHCB_AT) -> Exit:
        """Write the GHCB MSR and VMGEXIT: the first exit, which is a HLT when the hypervisor has answered."""
        self.put(CELL, struct.pack("<QQ", msr, 0))
        return self.run()

    def ask(self, exit_code: int, info_1: int = 0, info_2: int = 0, **fields: int) -> tuple[int, int]:
        """A request that is answered at once: sw_exit_info_1 and 2."""
        self.fill(exit_code, info_1, info_2, **fields)
        exit_ = self.call()
        assert exit_ == Hlt(), exit_
        return self.answer()

    def answer(self) -> tuple[int, int]:
        """sw_exit_info_1 and 2, as the guest has them now."""
        save = self.ghcb.save
        return int(save.sw_exit_info_1), int(save.sw_exit_info_2)

    def msr(self) -> int:
        """The GHCB MSR after the call."""
        return self.words(CELL + 8)[0]

    def valid(self) -> set[str]:
        """The fields that are marked as valid."""
        bits = int.from_bytes(bytes(self.ghcb.save.valid_bitmap), "little")
        names = {row[0] for row in abi.ghcb_save_area._fields_ if not row[0].startswith("reserved")}
        return {name for name in names if bits >> getattr(abi.ghcb_save_area, name).offset // 8 & 1}

    def respond_registers(self) -> tuple[int, int, int, int]:
        """RAX, RBX, RCX, RDX in the GHCB."""
        save = self.ghcb.save
        return int(save.rax), int(save.rbx), int(save.rcx), int(save.rdx)


__all__ = ["ALIAS", "CALLER", "CELL", "GHCB_AT", "PRIVATE_END", "REPORT", "SHARED", "Caller", "EsCode", "Report"]
