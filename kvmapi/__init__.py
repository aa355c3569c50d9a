"""kvmapi: KVM and SEV as Python objects, one per file descriptor, over a replaceable system-call seam.

    kvmapi.abi      numbers and layouts in the kernel's names
    kvmapi.table    one row per ioctl: number, struct, capability, words
    kvmapi.host     the seam (`Host`), kvmapi.kernel its real side, kvmapi.model the software one
    kvmapi.system   `System` -> `Vm` -> `Vcpu`, `GuestMemfd`; kvmapi.sev `SevPlatform`; kvmapi.launch `Launch`
    kvmapi.exits    what KVM_RUN came back with, as frozen dataclasses
    kvmapi.errors   `KvmError`: which ioctl, with what argument, why, and what to do

Importing this package imports nothing else; the names below are loaded when they are first used, so a command
that only prints help does not pay for ctypes layouts.

    >>> from kvmapi import KernelHost, System
    >>> with System(KernelHost()) as kvm:            # doctest: +SKIP
    ...     kvm.api_version()
    12
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmapi.errors import HostError, KvmError
    from kvmapi.host import Host
    from kvmapi.kernel import KernelHost
    from kvmapi.launch import Launch
    from kvmapi.memfd import GuestMemfd
    from kvmapi.sev import SevPlatform
    from kvmapi.system import System
    from kvmapi.vcpu import Vcpu
    from kvmapi.vm import Vm

__all__ = [
    "GuestMemfd",
    "Host",
    "HostError",
    "KernelHost",
    "KvmError",
    "Launch",
    "SevPlatform",
    "System",
    "Vcpu",
    "Vm",
]

_HOME = {
    "GuestMemfd": "memfd",
    "Host": "host",
    "HostError": "errors",
    "KernelHost": "kernel",
    "KvmError": "errors",
    "Launch": "launch",
    "SevPlatform": "sev",
    "System": "system",
    "Vcpu": "vcpu",
    "Vm": "vm",
}


def __getattr__(name: str) -> Any:
    """Load one of the public names from its module on first use (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
