"""The cheap ioctls on the model, through the same host call that a program's library makes.

Measured beside them, in the same run, is the kernel's answer to KVM_CHECK_EXTENSION where /dev/kvm opens: what a
system call costs here at all.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchlib.entry import Measured, entry, interleaved, median, need

ROUNDS, CALLS = 5, 20000
CAP_USER_MEMORY = 3


def _each(call: Callable[[], object]) -> Callable[[], float]:
    """Microseconds a call, over CALLS calls."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS * 1e6

    return measure


@entry("model_cheap_us", "us", 8)
def model_cheap() -> Measured:
    """The dearest of CHECK_EXTENSION, GET_REGS and SET_REGS on the model, one call."""
    need("model")
    from kvmapi.abi import ioctls
    from kvmapi.abi.vcpu import kvm_regs
    from kvmapi.kernel import KernelHost
    from kvmapi.model.host import ModelHost
    from kvmapi.system import System
    from vmm.doctor import reason_missing

    with ExitStack() as stack:
        host = ModelHost()
        system = stack.enter_context(System(host))
        vm = stack.enter_context(system.create_vm(0))
        vcpu = stack.enter_context(vm.create_vcpu(0))
        regs = kvm_regs()
        at = ctypes.addressof(regs)
        calls = {
            "check_extension": lambda: host.ioctl(system.fd, ioctls.KVM_CHECK_EXTENSION, CAP_USER_MEMORY),
            "get_regs": lambda: host.ioctl(vcpu.fd, ioctls.KVM_GET_REGS, at),
            "set_regs": lambda: host.ioctl(vcpu.fd, ioctls.KVM_SET_REGS, at),
        }
        if reason_missing("kvm") is None:
            real = KernelHost()
            kernel = stack.enter_context(System(real))
            calls["kernel_check_extension"] = lambda: real.ioctl(kernel.fd, ioctls.KVM_CHECK_EXTENSION, CAP_USER_MEMORY)
        results = interleaved(ROUNDS, *(_each(call) for call in calls.values()))
    medians = {f"{name}_us": round(median(values), 2) for name, values in zip(calls, results, strict=True)}
    worst = max(value for name, value in medians.items() if not name.startswith("kernel"))
    return Measured(worst, None, {**medians, "rounds": ROUNDS, "calls": CALLS})
