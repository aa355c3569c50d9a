"""Which host runs a guest: the machine's own kernel, or the software model of the same ioctls.

`auto` takes the kernel when it offers the VM type and what the guest needs, the model otherwise, and in both cases says why in one
sentence. Features are probed, versions never; a capability that is known to promise what does not arrive is tried out (`vmm.probe`).

Needs a guest may have (`needs`): "hypercall" (MAP_GPA_RANGE exits). Unknown needs are refused, so that a typing error cannot pass for a
feature.

    >>> choose("plain", on="model").name
    'model'
"""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls
from kvmapi.remedies import Remedy

if TYPE_CHECKING:
    from kvmapi.host import Host

TYPES = {"plain": 0, "sw-protected": 1, "sev": 2, "sev-es": 3}
"""VM type by its name on the command line (KVM_X86_*_VM)."""

RUNGS = ("auto", "kernel", "model")
NEEDS = frozenset({"hypercall"})

_REMEDIES = {"sw-protected": Remedy.SW_PROTECTED, "sev": Remedy.SEV, "sev-es": Remedy.SEV_ES}


class Unsupported(Exception):
    """No rung can do what was asked: `reason` in one sentence, `remedy` what to do about it (may be empty)."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Rung:
    """A chosen host: `name` is "kernel" or "model", `reason` one sentence for people."""

    name: str
    host: Host
    reason: str


def choose(type: str, on: str = "auto", needs: Set[str] = frozenset()) -> Rung:
    """Choose the host for a VM of `type` (a key of `TYPES`).

    Raises `Unsupported` when no rung (or not the named one) can, ValueError for a type, rung or need that does not exist.
    """
    if type not in TYPES or on not in RUNGS or not needs <= NEEDS:
        raise ValueError(f"type {type!r}, rung {on!r}, needs {sorted(needs)!r}: not all of them exist")
    if on == "model":
        return _model(type, "asked for")
    try:
        host, reason = _kernel(type, needs)
    except Unsupported as refusal:
        if on == "kernel":
            raise
        try:
            return _model(type, refusal.reason)
        except Unsupported as second:
            raise Unsupported(f"{refusal.reason}, and {second.reason}", second.remedy or refusal.remedy) from refusal
    return Rung("kernel", host, reason)


def _kernel(type: str, needs: Set[str]) -> tuple[Host, str]:
    """The kernel's host and why it can; raises `Unsupported` with why not."""
    from kvmapi.kernel import KernelHost

    host = KernelHost()
    try:
        mask = _vm_types(host)
    except OSError as failure:
        why = (failure.strerror or str(failure)).lower()
        remedy = "load the KVM module and give your user access to /dev/kvm (group kvm), or use --on model"
        raise Unsupported(f"/dev/kvm cannot be used: {why}", remedy) from failure
    if not mask >> TYPES[type] & 1:
        reason = f"this kernel's KVM has no VM type {type} (KVM_CAP_VM_TYPES = {mask:#x})"
        raise Unsupported(reason, _REMEDIES.get(type, "use --on model"))
    if type.startswith("sev"):
        try:
            host.close(host.open("/dev/sev", os.O_RDWR | os.O_CLOEXEC))
        except OSError as failure:
            why = (failure.strerror or str(failure)).lower()
            raise Unsupported(f"/dev/sev cannot be opened: {why}", "run as root on a SEV host, or use --on model") from failure
    if "hypercall" not in needs:
        return host, f"this kernel's KVM offers VM type {type}"
    from vmm import probe

    if not probe.hypercall_exits(host):
        reason = "the guest needs MAP_GPA_RANGE hypercalls, and on this kernel's KVM they do not reach user space"
        raise Unsupported(reason, "use --on model")
    return host, f"this kernel's KVM offers VM type {type}, and hypercalls reach user space"


def _model(type: str, reason: str) -> Rung:
    """The model's host; raises `Unsupported` when the model lacks the type or cannot be loaded."""
    try:
        host, note = _model_host(keeps=type.startswith("sev"))
        mask = _vm_types(host)
    except (ImportError, OSError) as failure:
        raise Unsupported(f"the model cannot be loaded: {failure}", "pip install unicorn==2.1.4 cryptography") from failure
    if not mask >> TYPES[type] & 1:
        raise Unsupported(f"the model has no VM type {type} (KVM_CAP_VM_TYPES = {mask:#x})", "use another --type")
    return Rung("model", host, reason + note)


def _model_host(keeps: bool) -> tuple[Host, str]:
    """A fresh model. With `keeps` it is this user's platform, whose keys outlive the process; a note when they cannot.

    Raises `Unsupported` when the platform's file is damaged: it holds keys, so nobody but its owner throws it away.
    """
    from kvmapi.model.host import ModelHost

    if not keeps:
        return ModelHost(), ""
    from kvmapi.model.platform import Platform
    from kvmapi.model.sev.store import Store, StoreError, StoreUnreachableError, default_path

    try:
        store = Store(default_path())
        store.check()
    except StoreUnreachableError as failure:
        return ModelHost(), f"; its platform's keys are not kept, because {failure.path} cannot be written: {failure.reason}"
    except StoreError as failure:
        reason = f"the model platform's keys in {failure.path} cannot be used: {failure.reason}"
        raise Unsupported(reason, failure.remedy) from failure
    return ModelHost(Platform(store=store)), ""


def choose_platform(on: str = "auto") -> Rung:
    """Choose the host whose /dev/sev answers: `auto` takes the kernel when it has one that opens, if only for reading.

    Raises `Unsupported`, and ValueError for a rung that does not exist.
    """
    if on not in RUNGS:
        raise ValueError(f"rung {on!r} does not exist")
    reason = "asked for"
    if on != "model":
        from kvmapi.kernel import KernelHost

        host = KernelHost()
        try:
            mode = _opens(host, "/dev/sev")
            return Rung("kernel", host, f"/dev/sev opens for {mode}")
        except OSError as failure:
            reason = f"/dev/sev cannot be opened: {(failure.strerror or str(failure)).lower()}"
            if on == "kernel":
                raise Unsupported(reason, "run as root on a SEV host, or use --on model") from failure
    try:
        model, note = _model_host(keeps=True)
    except (ImportError, OSError) as failure:
        raise Unsupported(f"the model cannot be loaded: {failure}", "pip install unicorn==2.1.4 cryptography") from failure
    return Rung("model", model, reason + note)


def _opens(host: Host, path: str) -> str:
    try:
        host.close(host.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        host.close(host.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return "reading only"
    return "reading and writing"


def amd_certificates(rung: Rung) -> bytes:
    """ASK and ARK above the platform of a rung: the model has its own; those of hardware are AMD's to publish (b"")."""
    platform = getattr(rung.host, "platform", None)
    return b"" if platform is None else bytes(platform.firmware.identity.amd_certificates)


def kept_in(rung: Rung) -> str:
    """The file with the keys of a model's platform; "" for keys that end with the process, and for hardware."""
    store = getattr(getattr(rung.host, "platform", None), "store", None)
    return "" if store is None else str(store.path)


def _vm_types(host: Host) -> int:
    """Mask of the VM types a host offers; a kernel that does not know the capability has type plain alone. Raises OSError."""
    kvm = host.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        mask = host.ioctl(kvm, ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_VM_TYPES)
    finally:
        host.close(kvm)
    return mask if mask > 0 else 1 << TYPES["plain"]
