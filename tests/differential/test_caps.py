"""Capabilities on the model and on a kernel: what they answer, what KVM_ENABLE_CAP takes, and the small ioctls beside them.

No guest runs here, because some capabilities change what a guest may do (a HLT that does not exit, say).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvmapi.abi import caps, ioctls
from kvmapi.abi import structs as s
from kvmapi.kernel import KernelHost
from kvmapi.model.host import ModelHost
from kvmapi.system import System
from tests.conformance.snippets import PAGE, Machine
from tests.differential.pair import Pair

NAMES = {value: name for name, value in vars(caps).items() if name.startswith("KVM_CAP_")}
# What a random argument of these means to a kernel goes beyond the VM: other VMs' fds, permissions of this process.
LEFT_OUT = {
    caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, caps.KVM_CAP_SGX_ATTRIBUTE,
    caps.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES,
}  # fmt: skip

numbers = st.one_of(st.sampled_from(sorted(NAMES)), st.integers(0, 300), st.sampled_from([1 << 16, (1 << 32) - 1]))
small = st.one_of(st.integers(0, 40), st.sampled_from([1 << 12, 1 << 13, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]))


def said(number: int) -> str:
    return NAMES.get(number, hex(number))


class Caps(RuleBasedStateMachine):
    """The rules."""

    pair: Pair
    there: frozenset[int]
    """Capabilities that the model says it has."""

    @initialize()
    def start(self) -> None:
        self.pair = Pair(KernelHost(), ModelHost(), Machine)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()

    @rule(number=numbers, on=st.sampled_from(["system", "vm"]))
    def check(self, number: int, on: str) -> None:
        self.pair.see(
            f"KVM_CHECK_EXTENSION({said(number)}) on {on}",
            lambda side: getattr(side, on).ioctl_raw(ioctls.KVM_CHECK_EXTENSION, number),
            what="KVM_CHECK_EXTENSION",
            fields={"cap": number},
        )

    @rule(
        data=st.data(), number=numbers, flags=st.sampled_from([0, 0, 0, 0, 1, 1 << 31]), first=small, second=st.sampled_from([0, 0, 0, 1])
    )
    def enable(self, data: st.DataObject, number: int, flags: int, first: int, second: int) -> None:
        if data.draw(st.integers(0, 3)):
            number = data.draw(st.sampled_from(sorted(self.there)))
        if number in LEFT_OUT:
            return
        argument = s.kvm_enable_cap(cap=number, flags=flags)
        argument.args[0], argument.args[1] = first, second
        self.pair.see(
            f"KVM_ENABLE_CAP({said(number)}, flags={flags}, {first:#x}, {second})",
            lambda side: min(side.vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, ctypes.addressof(argument)), 0),
            what="KVM_ENABLE_CAP",
            fields={"cap": number, "lacked": number not in self.there},
        )

    @rule(argument=small)
    def api_version(self, argument: int) -> None:
        self.pair.ioctl("system", "KVM_GET_API_VERSION", argument)

    @rule(argument=st.sampled_from([0, PAGE, 0xFFFBD000, 0xFFFFC000, 0xFFFFD000, 0xFFFFE000, 1 << 32]))
    def tss_address(self, argument: int) -> None:
        self.pair.ioctl("vm", "KVM_SET_TSS_ADDR", argument)

    @rule(argument=st.sampled_from([0, PAGE, 1, 0xFFFBC000, 1 << 32, 1 << 63]))
    def identity_map(self, argument: int) -> None:
        value = ctypes.c_uint64(argument)
        self.pair.see(
            f"KVM_SET_IDENTITY_MAP_ADDR({argument:#x})",
            lambda side: side.vm.ioctl_raw(ioctls.KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(value)),
            what="KVM_SET_IDENTITY_MAP_ADDR",
        )

    @rule(argument=st.sampled_from([0, 1, 63, 64, 65, 1000]))
    def mmu_pages(self, argument: int) -> None:
        self.pair.ioctl("vm", "KVM_SET_NR_MMU_PAGES", argument)

    @rule(argument=st.sampled_from([0, 1, 2, 3, 3, 4095, 4096, 1 << 31, 1 << 32, 1 << 63]))
    def vcpu(self, argument: int) -> None:
        def create(side: Any) -> int:
            fd = int(side.vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, argument))
            if fd >= 0:
                side.host.close(fd)
            return min(fd, 0)

        self.pair.see(f"KVM_CREATE_VCPU({argument:#x}), close", create, what="KVM_CREATE_VCPU", fields={"id": argument})

    @rule(argument=st.sampled_from([4, 5, 6, 7, 31, 32, 1 << 31, 1 << 32, (1 << 64) - 1]))
    def vm(self, argument: int) -> None:
        self.pair.ioctl("system", "KVM_CREATE_VM", argument)

    @rule(number=st.sampled_from([0xAEFF, 0xAE00 | 0xF5, 0xFFFFFFFF, 0]), on=st.sampled_from(["system", "vm"]))
    def unknown(self, number: int, on: str) -> None:
        self.pair.see(f"ioctl {number:#x} on {on}", lambda side: getattr(side, on).ioctl_raw(number, 0))


@pytest.mark.kvm
def test_capabilities(drive: Callable[..., None]) -> None:
    with System(ModelHost()) as model:
        there = frozenset(number for number in NAMES if model.check_extension(number))
    drive(Caps, 60, 25, there=there)
