"""SEV-ES guests that lie to the hypervisor. Whatever they claim, they get an answer, an error, or an exit that the VMM can ignore, and
the host never sees what they did not put into the GHCB (`vmm.selftests.hostile.ghcb_guest`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from errno import EFAULT, EINVAL

from kvmapi.abi import kvm
from kvmapi.errors import KvmError
from kvmapi.exit_types import ApResetHold, Exit, Hypercall, InternalError, Io, RunFailed, SystemEvent
from kvmapi.vcpu import Vcpu
from vmm.selftests.api import Bench, MachineFactory, Slot, Sync, check_equal, expect_errno, fail, runs_on
from vmm.selftests.hostile.attack import Attack
from vmm.selftests.hostile.ghcb_guest import LIES, MOVED, MSR_LIES, UNTOLD

SLOT, PORT = 0xB0000000, 0x1234
_UNTOLD = UNTOLD.to_bytes(8, "little")
_PARTS = (_UNTOLD, _UNTOLD[:4], _UNTOLD[4:])
_TERMINATION = 0x100
Note = Callable[[str], None]


class Host:
    """The VMM's half: lets the guest go on after anything, and looks at everything it gets to see."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seen: Counter[str] = Counter()
        self.terminations = 0
        bench.handlers.append(self.survive)

    def survive(self, vcpu: Vcpu, exit: Exit) -> bool:
        """The dispatcher answers what it can; the rest would end an ordinary run, and is ignored here."""
        self.seen[exit.name] += 1
        self.look(vcpu)
        if isinstance(exit, SystemEvent):
            check_equal(exit.type, kvm.KVM_SYSTEM_EVENT_SEV_TERM, "the system event's type")
            self.terminations += 1
        if isinstance(exit, Hypercall):  # a conversion of any page, the guest's code too: it did not ask the processor for one
            vcpu.answer_hypercall(0)
        return isinstance(exit, RunFailed | SystemEvent | ApResetHold | InternalError | Hypercall)

    def look(self, vcpu: Vcpu) -> None:
        """Nothing that the guest did not tell may stand in kvm_run."""
        shown = bytes(vcpu.run_map)
        for part in _PARTS:
            if (at := shown.find(part)) >= 0:
                fail(f"kvm_run shows at {at:#x} what the guest kept for itself")

    def sync(self) -> Sync:
        """The guest's next SYNC. KVM_RUN fails for what KVM does not want to do, and the guest goes on when it is called again."""
        while True:
            try:
                return self.bench.sync()
            except KvmError as refusal:
                if refusal.errno not in (EINVAL, EFAULT):
                    raise
                self.seen["RUN_FAILED"] += 1


@runs_on("sev-es")
def test_lying_ghcb(machine: MachineFactory, note: Note) -> None:
    """Wrong values in every field, for every exit code, with and without their valid bits."""
    rounds, codes = 100, 36
    with Attack(machine, LIES, note, arguments=f"rounds={rounds}") as attack:
        m, host = attack.bench, Host(attack.bench)
        done, raised, malformed, other, *_ = host.sync().args
        note(f"{done} done, {raised} exceptions, {malformed} malformed; exits {dict(host.seen)}")
        check_equal(other, 0, "answers that are none")
        check_equal(done + raised + malformed, rounds * codes, "answers")
        missing = [name for name in ("IO", "MMIO", "HYPERCALL", "AP_RESET_HOLD", "RUN_FAILED") if not host.seen[name]]
        check_equal(missing, [], "exits that did not come")
        check_equal(min(done, raised, malformed) > 0, True, "every kind of answer")
        with expect_errno(EINVAL):
            m.vcpus[0].get_regs()
        m.done()


@runs_on("sev-es")
def test_lying_msr(machine: MachineFactory, note: Note) -> None:
    """Every request of the MSR protocol, known or not, and GHCBs where no memory, or private memory, is."""
    with Attack(machine, MSR_LIES, note) as attack:
        host = Host(attack.bench)
        changed = host.sync().args[0]
        note(f"{changed} of 4095 requests were answered in the MSR; exits {dict(host.seen)}")
        check_equal(host.terminations, 4, "terminations: the request for one, and the three that only SEV-SNP guests may ask")
        check_equal(host.seen["AP_RESET_HOLD"], 1, "AP reset holds")
        check_equal(changed, 4, "requests that are answered in the MSR: SEV information, CPUID, reset hold, features")
        attack.bench.done()


@runs_on("sev-es")
def test_ghcb_taken_away(machine: MachineFactory, note: Note) -> None:
    """The memslot of the GHCB goes away between an exit and the answer: the answer is lost, the guest goes on."""
    rounds, away = 24, [0]
    with Attack(machine, MOVED, note, slots=[Slot(10, SLOT, 4096)], arguments=f"rounds={rounds}") as attack:
        m, host = attack.bench, Host(attack.bench)
        slot = m.memory.slot_at(SLOT)
        assert slot is not None

        def take_away(vcpu: Vcpu, exit: Exit) -> bool:
            if isinstance(exit, Io) and exit.port == PORT:
                m.vm.set_user_memory_region2(10, SLOT, 0, slot.hva)
                away[0] += 1
            return False

        m.handlers.append(take_away)
        for number in range(rounds):
            said = host.sync()
            check_equal((said.stage, said.args[0]), (1, number), "the guest's round")
            m.vm.set_user_memory_region2(10, SLOT, 4096, slot.hva)
        check_equal(host.sync().stage, 2, "the guest's last word")
        check_equal(away[0], rounds, "exits during which the GHCB was taken away")
        m.done()
