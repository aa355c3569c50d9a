"""What this host can do, per rung, with evidence and remedy: the answer behind `sevmm doctor` and behind the skip texts of the tests.

The rungs, best first: a SEV-ES, a SEV, a SW_PROTECTED, a plain VM on the machine's own kernel, and the software model. A rung's verdict is
made of facts that were gathered by asking (`doctor_machine`, `doctor_kvm`, `doctor_sev`); the first deciding fact that is not ok gives
reason and remedy. Remedies are those of `kvmapi.remedies`, which exceptions quote too.

    >>> diagnosis = examine()
    >>> diagnosis.rung("model").state
    'ok'
    >>> reason_missing("kvm")          # None: /dev/kvm opens here

Examining takes about 20 ms; where a capability promises hypercall exits, a guest of a few instructions is run to see one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmapi.abi import caps, ioctls
from vmm import doctor_kvm, doctor_machine, doctor_sev
from vmm.facts import NO, OK, UNKNOWN, Fact, Surroundings, errno_words

KINDS = ("kvm", "sev", "sev-es", "sw-protected", "hypercall", "memory-attributes", "guest-memfd", "gcc", "model")
"""What `reason_missing` knows, and `--require` of the test command with it."""


@dataclass(frozen=True)
class RungVerdict:
    """One rung: `name` is the VM type, or "model"; `on` which side answers; `facts` the names of the facts that decided."""

    name: str
    on: str
    state: str
    reason: str
    remedy: str
    facts: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when guests of this type can run here."""
        return self.state == OK

    def to_json(self) -> dict[str, Any]:
        """The object under `rungs` in `sevmm doctor --json`."""
        return {
            "name": self.name, "on": self.on, "state": self.state, "reason": self.reason, "remedy": self.remedy,
            "facts": list(self.facts),
        }  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """All rungs, best first, and all facts."""

    rungs: tuple[RungVerdict, ...]
    facts: tuple[Fact, ...]

    def rung(self, name: str) -> RungVerdict:
        """The verdict called `name`; KeyError."""
        return {rung.name: rung for rung in self.rungs}[name]

    def fact(self, name: str) -> Fact:
        """The fact called `name`; one that was not asked is unknown."""
        found = {fact.name: fact for fact in self.facts}
        return found.get(name) or Fact(name, name, UNKNOWN, f"{name}: could not be asked")

    def to_json(self) -> dict[str, Any]:
        """`sevmm doctor --json`."""
        return {"rungs": [rung.to_json() for rung in self.rungs], "facts": [fact.to_json() for fact in self.facts]}


def examine(where: Surroundings | None = None) -> Diagnosis:
    """Ask everything. Never raises: what cannot be asked is a fact that says so."""
    where = where or Surroundings()
    kvm_facts = doctor_kvm.gather(where.open_kernel, where.probe_guests)
    facts = (*doctor_machine.gather(where), *kvm_facts, *doctor_sev.gather(where), model(where))
    collected = Diagnosis((), facts)
    kernel_rungs = [_sev_rung("sev-es", collected), _sev_rung("sev", collected), _sw_protected(collected)]
    return Diagnosis((*kernel_rungs, _plain(collected), _model_rung(collected)), facts)


def model(where: Surroundings) -> Fact:
    """Whether the software model starts, and which VM types it offers."""
    title = "software model"
    try:
        host = where.open_model()
        fd = host.open("/dev/kvm", 0)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        remedy = f"pip install {package}, or start with scripts/sevmm" if package not in ("", "kvmapi") else ""
        return Fact("model", title, NO, f"the model does not start: {error}", remedy)
    except OSError as error:
        return Fact("model", title, NO, f"the model does not start: {errno_words(error.errno or 0)}")
    try:
        mask = host.ioctl(fd, ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_VM_TYPES)
    finally:
        host.close(fd)
    return Fact("model", title, OK, f"the model answers KVM_CAP_VM_TYPES = {mask:#x}: {', '.join(doctor_kvm.vm_types(mask))}")


def reason_missing(kind: str, where: Surroundings | None = None) -> str | None:
    """Why something of `KINDS` is not there and how to get it, in one sentence; None when it is there.

    Asks only what the kind needs. ValueError for a kind that is not known.

        >>> reason_missing("sev")
        'stat /dev/sev: ENOENT (No such file or directory); get it: an AMD host with SEV, ...'
    """
    where = where or Surroundings()
    if kind == "gcc":
        facts = [doctor_machine.tool(where, "gcc", "apt install gcc"), doctor_machine.tool(where, "ld", "apt install binutils")]
    elif kind == "model":
        facts = [model(where)]
    elif kind == "kvm":
        facts = [doctor_machine.device(where, "/dev/kvm")]
        if facts[0].ok:
            asked = {fact.name: fact for fact in doctor_kvm.gather(where.open_kernel, probe_guests=False)}
            facts += [asked[name] for name in ("kvm", "create-vm") if name in asked]
    elif kind in ("hypercall", "memory-attributes", "guest-memfd"):
        asked = {fact.name: fact for fact in doctor_kvm.gather(where.open_kernel, where.probe_guests and kind == "hypercall")}
        name = {"hypercall": "hypercall-exits"}.get(kind, kind)
        facts = [doctor_machine.device(where, "/dev/kvm"), asked.get(name) or asked["kvm"]]
    elif kind in doctor_kvm.TYPE_REMEDIES:
        verdict = examine(where).rung(kind)
        facts = [Fact(kind, kind, verdict.state, verdict.reason, verdict.remedy)]
    else:
        raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
    return next((fact.missing for fact in facts if not fact.ok), None)


def _decide(name: str, diagnosis: Diagnosis, deciding: tuple[str, ...], reason: str, useful: tuple[str, ...] = ()) -> RungVerdict:
    """A kernel rung: the first of the `deciding` facts that is not ok decides; a `useful` one that is not ok is told, no more."""
    for fact in map(diagnosis.fact, deciding):
        if not fact.ok:
            return RungVerdict(name, "kernel", fact.state, fact.evidence, fact.remedy, deciding + useful)
    for fact in map(diagnosis.fact, useful):
        if not fact.ok:
            reason += f"; but {fact.title}: {fact.evidence}"
    return RungVerdict(name, "kernel", OK, reason, "", deciding + useful)


def _sev_rung(name: str, diagnosis: Diagnosis) -> RungVerdict:
    deciding = ("dev-kvm", "kvm", f"type-{name}", "encrypt-op", "dev-sev")
    reason = f"KVM offers the type, and {diagnosis.fact('encrypt-op').evidence}"
    missing = tuple(fact for fact in (f"{name}-asids", "sev-firmware") if diagnosis.fact(fact).state == NO)  # unknown is no news
    return _decide(name, diagnosis, deciding, reason, ("hypercall-exits", "memlock", *missing))


def _sw_protected(diagnosis: Diagnosis) -> RungVerdict:
    deciding = ("dev-kvm", "kvm", "type-sw-protected", "guest-memfd", "memory-attributes", "memory-fault-exits")
    return _decide("sw-protected", diagnosis, deciding, "KVM offers the type, guest_memfd and memory attributes", ("hypercall-exits",))


def _plain(diagnosis: Diagnosis) -> RungVerdict:
    return _decide("plain", diagnosis, ("dev-kvm", "kvm", "create-vm"), "KVM_CREATE_VM(0) works", ("hypercall-exits",))


def _model_rung(diagnosis: Diagnosis) -> RungVerdict:
    fact = diagnosis.fact("model")
    return RungVerdict("model", "model", fact.state, fact.evidence, fact.remedy, (fact.name,))
