"""One vCPU's GHCB on the hypervisor's side: the MSR, the page that a VMGEXIT handed over, and the way back.

VMGEXIT is a trap: RIP is behind it already. What it asks for is either answered at once, or an exit leaves KVM_RUN and the
page stays handed over (`open`) until the guest is entered again; only then RAX to RDX go back (`finish`), as in KVM. Until
then the registers of the request are KVM's general registers: the legacy type 0 shows them in KVM_GET_REGS.

The page is looked up again for every access. KVM holds on to it once it is mapped; here, when the VMM takes the memory away
meanwhile, answers are lost instead of going to a page that nobody has any more.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmapi.abi import ghcb as abi
from kvmapi.abi import kvm
from kvmapi.model.caller import Errno
from kvmapi.model.cpu import fpu
from kvmapi.model.cpu.cpu import KICKED, Cpu
from kvmapi.model.cpu.state import RAX, RBX, RCX, RDX
from kvmapi.model.ghcb import events, io, memory, msr_protocol, page, scratch
from kvmapi.model.ghcb.msr_protocol import Hold
from kvmapi.model.mem.physical import Refused

if TYPE_CHECKING:
    from kvmapi.model.cpu.policy import ExitPolicy
    from kvmapi.model.protected import ProtectedState
    from kvmapi.model.sev.context import SevContext
    from kvmapi.model.vcpu import VcpuFile

_SNP_ONLY = frozenset((abi.SVM_VMGEXIT_AP_CREATION, abi.SVM_VMGEXIT_GUEST_REQUEST, abi.SVM_VMGEXIT_EXT_GUEST_REQUEST, abi.SVM_VMGEXIT_PSC))
_HANDLERS = {**events.HANDLERS, **io.HANDLERS}
_GENERAL = struct.Struct("<4Q16xQ72x")  # 16 registers in the encoder's order: RAX, RCX, RDX, RBX, then RSI; zeroes elsewhere
BRANCH_RECORDS = (0x1D9, 0x1DB, 0x1DC, 0x1DD, 0x1DE)  # DEBUGCTL and the last branch's MSRs: the model records none
_INVALID_PAGE = (1 << 64) - 1


class GhcbUnit:
    """The GHCB of one vCPU. Used with the engine lock held and guest memory open, unless said otherwise."""

    def __init__(self, vcpu: VcpuFile, protected: ProtectedState) -> None:
        self.vcpu = vcpu
        self.cpu: Cpu = vcpu.cpu
        self.sev: SevContext = vcpu.vm.sev
        self.policy: ExitPolicy = vcpu.vm.exits
        self.protected = protected
        self.registers = protected.general  # KVM's, in the encoder's order
        self.msr = msr_protocol.sev_info(self.sev.ghcb_version)
        self.branches = dict.fromkeys(BRANCH_RECORDS, 0)  # in the VMSA, too
        self.hold = Hold.NONE
        self.started = False  # the first startup IPI runs the VMSA as it was measured; later ones end a hold
        self.open: int | None = None  # GPA of the page that was handed over
        self.request: page.Request | None = None
        self._pointer = 0  # where our process sees that page
        self._woken = False
        self._buffer: scratch.Buffer | None = None

    def __repr__(self) -> str:
        return f"GhcbUnit(vcpu {self.vcpu.id})"

    # ---- VMGEXIT
    def vmgexit(self, length: int) -> int | None:
        """The instruction, of so many bytes: KVM_RUN's result, or None when the guest goes on."""
        self.cpu.privileged.advance(length)
        result = msr_protocol.handle(self) if self.msr & abi.GHCB_MSR_INFO_MASK else self._handed_over()
        if result is None:
            self.finish()
        return result

    def _handed_over(self) -> int | None:
        self.open = self.msr
        view = self.view() if self.msr else None
        if view is None:  # KVM lets the guest go on as if nothing had been asked
            self.open = None
            return None
        self.request = request = page.take(view)
        self._take_registers(request)
        wrong, handler = _wrong(request), _HANDLERS.get(request.code)
        if wrong or handler is None:
            self.malformed(wrong or abi.GHCB_ERR_INVALID_EVENT)
            return None
        page.respond(view, abi.GHCB_HV_RESP_NO_ACTION, 0)
        try:
            return handler(self, request)
        except scratch.BadScratch:
            self.malformed(abi.GHCB_ERR_INVALID_SCRATCH_AREA)
            return None
        except Refused:
            return self.ends(errno.EFAULT)
        except Errno as why:
            return self.ends(why.number)

    def _take_registers(self, request: page.Request) -> None:
        self.registers.cast("B")[:] = _GENERAL.pack(request.rax, request.rcx, request.rdx, request.rbx, request.rsi)
        xcr0 = request.xcr0
        if xcr0 is not None and xcr0 & fpu.X87 and not xcr0 & ~fpu.SUPPORTED:
            self.protected.set_xcr0(xcr0)

    # ---- the way back
    def finish(self) -> None:
        """The guest is about to be entered: no hold any more, and what is open goes back."""
        self.hold = Hold.NONE
        if self.open is None:
            return
        buffer, self._buffer = self._buffer, None
        touched = buffer.sync() if buffer is not None else set()
        view = self.view()
        if view is not None:
            if self._woken:
                page.respond(view, abi.GHCB_HV_RESP_NO_ACTION, 1)
            registers = self.registers
            page.give(view, registers[RAX], registers[RBX], registers[RCX], registers[RDX])
            touched.add(self._pointer)
        self.open, self.request, self._woken = None, None, False
        if not touched.isdisjoint(self.cpu.code.pointers):
            self.cpu.code.verify()  # a guest that executes there

    def ends(self, number: int) -> int:
        """KVM_RUN fails; when it is called again, the guest goes on."""
        return self.cpu.page.head(kvm.KVM_EXIT_UNKNOWN) - number

    # ---- answers
    def view(self) -> memoryview | None:
        """The page that is handed over, as it is now; None when it cannot be had for writing."""
        if self.open is None:
            return None
        try:
            self._pointer, view = memory.user_page(self.vcpu.vm.physical, self.open, True)
        except Refused:
            return None
        return view

    def respond(self, response: int, data: int) -> None:
        """sw_exit_info_1 and 2."""
        view = self.view()
        if view is not None:
            page.respond(view, response, data)

    def malformed(self, number: int) -> None:
        """GHCB_HV_RESP_MALFORMED_INPUT, and why."""
        self.respond(abi.GHCB_HV_RESP_MALFORMED_INPUT, number)

    def inject(self, vector: int) -> None:
        """The #VC handler is to raise this exception."""
        self.respond(abi.GHCB_HV_RESP_ISSUE_EXCEPTION, abi.SVM_EVTINJ_VALID | abi.SVM_EVTINJ_TYPE_EXEPT | vector)

    def buffer(self, request: page.Request, size: int, back: bool) -> scratch.Buffer:
        """The request's buffer of `size` bytes. Raises BadScratch, or Refused when there is no memory."""
        assert self.open is not None
        found = scratch.locate(request.scratch, size, self.open, self.view, self.vcpu.vm.physical, self.sev.ghcb_version, back)
        self._buffer = found
        return found

    # ---- waiting for a startup IPI
    def wait(self, kind: Hold) -> int:
        """AP reset hold: sleep, or with the local APICs in user space leave it to that."""
        self.hold = kind
        if self.cpu.lapic is None:
            return self.cpu.page.head(kvm.KVM_EXIT_AP_RESET_HOLD)
        self.vcpu.activity.hold()
        return KICKED

    def startup_ipi(self) -> None:
        """Needs no guest memory: what is due goes into the page by `finish`."""
        if not self.started:
            self.started = True
        elif self.hold == Hold.PAGE:
            self._woken = True
        elif self.hold == Hold.MSR:
            self.msr = msr_protocol.hold_ended(self.msr, 1)

    # ---- KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
    def take_over(self, source: GhcbUnit) -> None:
        """The guest moves here from another VM's vCPU."""
        self.msr, self.hold, self.started = source.msr, source.hold, source.started
        self.branches.update(source.branches)
        self.open, self._woken = source.open, source._woken
        source.msr, source.open, source._buffer = _INVALID_PAGE, None, None


def _wrong(request: page.Request) -> int:
    """What is wrong with it before anyone looks at what it asks for: a GHCB_ERR_* number, 0 for nothing."""
    if request.usage != abi.GHCB_DEFAULT_USAGE:
        return abi.GHCB_ERR_INVALID_USAGE
    if request.code in _SNP_ONLY:
        return abi.GHCB_ERR_INVALID_EVENT
    return 0 if request.complete() else abi.GHCB_ERR_MISSING_INPUT
