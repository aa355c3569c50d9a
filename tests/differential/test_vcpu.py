"""A vCPU's state on the model and on a kernel: the same random writes are taken or refused, and read back the same.

Both sides have the same CPUID: what the two hosts support in common. What only the processor would refuse (KVM takes
any segment, say) must not be run, so a guest runs only while its system registers are those it started with, but for
a few fields that any guest may have otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvmapi.abi import ioctls, kvm
from kvmapi.abi import vcpu as v
from kvmapi.buffers import HeaderAndEntries
from kvmapi.kernel import KernelHost
from kvmapi.model.host import ModelHost
from kvmapi.system import System
from tests.conformance.snippets import CODE, DATA, REAL_CODE, REAL_DATA, STACK, LongGuest, RealGuest, code
from tests.differential.pair import Pair, fields_of, words_of

LONG = code("50 5b 488d0c38 9c 5a f4", "push rax; pop rbx; lea rcx, [rax + rdi]; pushf; pop rdx; hlt")
REAL = code("50 5b 8cd9 9c 5a 90 f4", "push ax; pop bx; mov cx, ds; pushf; pop dx; nop; hlt", 16)
GPRS = [name for name in v.GENERAL_REGISTERS if name not in ("rip", "rflags", "rsp")]
FEATURE_LEAVES = {1: ("ecx", "edx"), 7: ("ebx", "ecx", "edx"), 0x80000001: ("ecx", "edx")}

numbers = st.one_of(
    st.integers(0, 15), st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 47, (1 << 47) - 1, 0xFFFF800000000000, 1 << 63])
)
canonical = st.sampled_from([0, 1, 0x1000, DATA, (1 << 47) - 1, 0xFFFF800000000000, 0xFFFFFFFFFFFFF000])
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
CR0 = [1 << bit for bit in (0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31, 32, 20)]
CR4 = [1 << bit for bit in range(33)]
EFER = [1 << bit for bit in (0, 1, 4, 8, 10, 11, 12, 13, 14, 15, 63)]
MSRS = (
    0x10, 0x1B, 0x8B, 0xFE, 0x174, 0x175, 0x176, 0x1A0, 0x200, 0x277, 0x2FF, 0x3B, 0xDEAD, 0x40000FFF,
    0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103, 0xC0010131,
)  # fmt: skip
TSC = 0x10


def changes() -> st.SearchStrategy[tuple[str, int]]:
    """One field of struct kvm_sregs and what to do to it: a bit to flip of a control register, or a value."""
    segment = st.tuples(
        st.sampled_from(
            [f"{name}.{field}" for name in SEGMENTS for field in ("selector", "limit", "type", "present", "dpl", "s", "l", "db")]
        ),
        st.sampled_from([0, 1, 2, 3, 7, 11, 0xFFFF, 0xFFFFF, 0xFFFFFFFF]),
    )
    return st.one_of(
        st.tuples(st.just("cr0"), st.sampled_from(CR0)),
        st.tuples(st.just("cr4"), st.sampled_from(CR4)),
        st.tuples(st.just("efer"), st.sampled_from(EFER)),
        st.tuples(st.just("cr3"), st.sampled_from([0, 0x1000, 0x1001, 0xFFF, 1 << 40, 1 << 51, 1 << 52, 1 << 63])),
        st.tuples(st.just("cr8"), st.integers(0, 17)),
        st.tuples(st.just("cr2"), numbers),
        st.tuples(
            st.just("apic_base"), st.sampled_from([0xFEE00900, 0xFEE00800, 0xFEE00100, 0xFEE00D00, 0, 0xFEE00901, 1 << 52, 0xFED00900])
        ),
        st.tuples(st.sampled_from([f"{name}.base" for name in SEGMENTS]), numbers),
        st.tuples(st.sampled_from(["gdt.base", "idt.base"]), numbers),
        st.tuples(st.sampled_from(["gdt.limit", "idt.limit"]), st.integers(0, 0xFFFF)),
        segment,
    )


def common_cpuid() -> list[v.kvm_cpuid_entry2]:
    """CPUID of both sides: the model's, less the features that the kernel does not have."""
    with System(KernelHost()) as kernel, System(ModelHost()) as model:
        there = {(leaf.function, leaf.index): leaf for leaf in kernel.supported_cpuid()}
        leaves = model.supported_cpuid()
    for leaf in leaves:
        other = there.get((leaf.function, leaf.index))
        for register in FEATURE_LEAVES.get(leaf.function, ()):
            setattr(leaf, register, getattr(leaf, register) & (getattr(other, register) if other is not None else 0))
    return [leaf for leaf in leaves if leaf.function != 0x8000001F]


def put(struct_: Any, path: str, value: int) -> None:
    """Set a field, or flip the bits of a control register."""
    *way, name = path.split(".")
    for step in way:
        struct_ = getattr(struct_, step)
    setattr(struct_, name, getattr(struct_, name) ^ value if name in ("cr0", "cr4", "efer") else value)


class State(RuleBasedStateMachine):
    """The rules."""

    pair: Pair
    cpuid: list[v.kvm_cpuid_entry2]

    @initialize(long=st.booleans())
    def start(self, long: bool) -> None:
        self.long = long
        self.healthy = True
        self.pair = Pair(KernelHost(), ModelHost(), lambda host: LongGuest(host, LONG) if long else RealGuest(host, REAL))
        for side in self.pair.sides:
            side.vcpu.set_cpuid2(self.cpuid)
        self.first = self.pair.model.vcpu.get_sregs()
        self.pair.kernel.vcpu.set_sregs(self.first)
        self.pair.log.append(f"a guest in {'64-bit' if long else 'real'} mode")
        self.everything()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()

    def everything(self) -> None:
        for name in ("REGS", "SREGS", "SREGS2", "FPU", "XCRS", "DEBUGREGS", "MP_STATE"):
            self.pair.ioctl("vcpu", f"KVM_GET_{name}")
        self.read_events()

    def read_events(self) -> None:
        """KVM_GET_VCPU_EVENTS, without what stands in the fields of an event that is not there."""

        def do(side: Any) -> Any:
            found = fields_of(side.vcpu.get_vcpu_events())
            for event, parts in (("exception", ("nr", "has_error_code", "error_code")), ("interrupt", ("nr", "soft"))):
                if not found[f"{event}.injected"]:
                    for part in parts:
                        del found[f"{event}.{part}"]
            return found

        self.pair.see("KVM_GET_VCPU_EVENTS()", do, what="KVM_GET_VCPU_EVENTS")

    # ---- rules
    @rule(values=st.dictionaries(st.sampled_from(GPRS), numbers, max_size=3), flags=st.sampled_from([2, 0, 0x202, 0xAD5, 0x3002, 0x246]))
    def regs(self, values: dict[str, int], flags: int) -> None:
        rip, rsp = (CODE, STACK) if self.long else (REAL_CODE, REAL_CODE)
        self.pair.ioctl("vcpu", "KVM_SET_REGS", rip=rip, rsp=rsp, rflags=flags, **values)
        self.pair.ioctl("vcpu", "KVM_GET_REGS")

    @rule(changed=st.lists(changes(), min_size=1, max_size=3, unique_by=lambda item: item[0]))
    def sregs(self, changed: list[tuple[str, int]]) -> None:
        self.healthy = False
        self._sregs("KVM_SET_SREGS", changed)

    @rule(changed=st.lists(changes(), min_size=1, max_size=3, unique_by=lambda item: item[0]))
    def sregs2(self, changed: list[tuple[str, int]]) -> None:
        self.healthy = False
        self._sregs("KVM_SET_SREGS2", changed)

    @rule(fs=canonical, gs=canonical, cr2=numbers, cr8=st.integers(0, 15))
    def good_sregs(self, fs: int, gs: int, cr2: int, cr8: int) -> None:
        self._sregs("KVM_SET_SREGS", [("fs.base", fs if self.long else 0), ("gs.base", gs if self.long else 0), ("cr2", cr2), ("cr8", cr8)])
        self.healthy = True

    def _sregs(self, name: str, changed: list[tuple[str, int]]) -> None:
        kind = v.kvm_sregs2 if name.endswith("2") else v.kvm_sregs

        def do(side: Any) -> int:
            argument = kind()
            ctypes.memmove(ctypes.addressof(argument), ctypes.addressof(self.first), kind.cr0.offset + 7 * 8)
            for path, value in changed:
                put(argument, path, value)
            return int(side.vcpu.ioctl_raw(getattr(ioctls, name), ctypes.addressof(argument)))

        said = ", ".join(f"{path} {'^=' if path in ('cr0', 'cr4', 'efer') else '='} {value:#x}" for path, value in changed)
        self.pair.see(f"{name}(the first ones with {said})", do, what=name, fields=dict(changed))
        self.pair.ioctl("vcpu", "KVM_GET_SREGS")

    @rule(
        data=st.binary(min_size=64, max_size=64),
        fcw=st.sampled_from([0x37F, 0x27F, 0x40, 0xFFFF]),
        fsw=st.integers(0, 0xFFFF),
        ftwx=st.integers(0, 255),
    )
    def fpu(self, data: bytes, fcw: int, fsw: int, ftwx: int) -> None:
        def make(_: Any) -> v.kvm_fpu:
            argument = v.kvm_fpu(fcw=fcw, fsw=fsw, ftwx=ftwx, last_opcode=0x123, last_ip=CODE, last_dp=DATA, mxcsr=0x1F80)
            for number in range(8):
                argument.fpr[number][:] = (data[8 * number : 8 * number + 8] + b"\xff\x3f").ljust(16, b"\0")
            for number in range(16):
                argument.xmm[number][:] = data[4 * number % 60 : 4 * number % 60 + 4] * 4
            return argument

        self.pair.ioctl("vcpu", "KVM_SET_FPU", make)
        self.pair.log[-1:] = (
            [f"KVM_SET_FPU(fcw={fcw:#x}, fsw={fsw:#x}, ftwx={ftwx:#x}, data {data.hex()})"] if not self.pair.settled else []
        )
        self.pair.ioctl("vcpu", "KVM_GET_FPU")

    @rule(
        count=st.sampled_from([0, 1, 1, 2, 16, 17]),
        flags=st.sampled_from([0, 0, 1]),
        xcr=st.sampled_from([0, 0, 1]),
        value=st.sampled_from([0, 1, 2, 3, 7, 5, 1 << 62]),
    )
    def xcrs(self, count: int, flags: int, xcr: int, value: int) -> None:
        argument = v.kvm_xcrs(nr_xcrs=count, flags=flags)
        for number in range(min(count, 16)):
            argument.xcrs[number].xcr, argument.xcrs[number].value = xcr if not number else 1, value
        request = f"KVM_SET_XCRS({count} of XCR{xcr} = {value:#x}, flags {flags})"
        self.pair.see(request, lambda side: side.vcpu.ioctl_raw(ioctls.KVM_SET_XCRS, ctypes.addressof(argument)), what="KVM_SET_XCRS")
        self.pair.ioctl("vcpu", "KVM_GET_XCRS")

    @rule(
        db=numbers,
        dr6=st.sampled_from([0xFFFF0FF0, 0, 0xFFFF0FF1, 1 << 32, 0x4000]),
        dr7=st.sampled_from([0x400, 0, 0xFFFFFFFF, 1 << 32, 0x2400]),
    )
    def debugregs(self, db: int, dr6: int, dr7: int) -> None:
        self.healthy = False
        argument = v.kvm_debugregs(dr6=dr6, dr7=dr7)
        argument.db[0] = db
        words = f"KVM_SET_DEBUGREGS(db[0]={db:#x}, dr6={dr6:#x}, dr7={dr7:#x})"
        self.pair.see(
            words, lambda side: side.vcpu.ioctl_raw(ioctls.KVM_SET_DEBUGREGS, ctypes.addressof(argument)), what="KVM_SET_DEBUGREGS"
        )
        self.pair.ioctl("vcpu", "KVM_GET_DEBUGREGS")

    @rule(
        values=st.fixed_dictionaries(
            {"exception.injected": st.booleans(), "exception.nr": st.sampled_from([0, 2, 3, 6, 13, 14, 31, 32]),
             "flags": st.integers(0, 31)},
            optional={
                "exception.pending": st.booleans(), "exception.has_error_code": st.booleans(), "interrupt.nr": st.integers(0, 255),
                "interrupt.injected": st.booleans(), "interrupt.shadow": st.integers(0, 3), "nmi.pending": st.integers(0, 3),
                "nmi.masked": st.booleans(), "nmi.injected": st.booleans(), "sipi_vector": st.integers(0, 255),
            },
        )
    )  # fmt: skip
    def events(self, values: dict[str, int]) -> None:
        self.healthy = False
        argument = v.kvm_vcpu_events()
        for path, value in values.items():
            put(argument, path, int(value))
        said = ", ".join(f"{path}={int(value)}" for path, value in values.items())
        self.pair.see(
            f"KVM_SET_VCPU_EVENTS({said})",
            lambda side: side.vcpu.ioctl_raw(ioctls.KVM_SET_VCPU_EVENTS, ctypes.addressof(argument)),
            what="KVM_SET_VCPU_EVENTS", fields=values,
        )  # fmt: skip
        self.read_events()
        self.calm()

    def calm(self) -> None:
        """No events."""
        flags = kvm.KVM_VCPUEVENT_VALID_NMI_PENDING | kvm.KVM_VCPUEVENT_VALID_SHADOW
        self.pair.ioctl("vcpu", "KVM_SET_VCPU_EVENTS", flags=flags)
        self.read_events()

    @rule(entries=st.lists(st.tuples(st.sampled_from(MSRS), numbers), min_size=1, max_size=3))
    def msrs(self, entries: list[tuple[int, int]]) -> None:
        self.healthy = False

        def do(request: int) -> Callable[[Any], Any]:
            def call(side: Any) -> Any:
                argument = HeaderAndEntries(v.kvm_msrs, v.kvm_msr_entry, len(entries))
                argument.header.nmsrs = len(entries)
                for entry, (number, value) in zip(argument.entries, entries):
                    entry.index, entry.data = number, value
                result = side.vcpu.ioctl_raw(request, ctypes.addressof(argument.header))
                done = list(argument.entries)[: max(result, 0)]
                return {"result": result, **{hex(entry.index): entry.data for entry in done if entry.index != TSC}}

            return call

        said = ", ".join(f"{number:#x}={value:#x}" for number, value in entries)
        fields = {hex(number): value for number, value in entries}
        self.pair.see(f"KVM_SET_MSRS({said})", do(ioctls.KVM_SET_MSRS), what="KVM_SET_MSRS", fields=fields)
        self.pair.see(f"KVM_GET_MSRS({', '.join(fields)})", do(ioctls.KVM_GET_MSRS), what="KVM_GET_MSRS", fields=fields)
        self.pair.ioctl("vcpu", "KVM_GET_SREGS")

    @rule(state=st.integers(0, 12))
    def mp_state(self, state: int) -> None:
        self.pair.ioctl("vcpu", "KVM_SET_MP_STATE", mp_state=state)
        self.pair.ioctl("vcpu", "KVM_GET_MP_STATE")
        self.pair.ioctl("vcpu", "KVM_SET_MP_STATE", mp_state=0)

    @rule(gva=st.one_of(numbers, st.sampled_from([CODE, DATA, 0x3FE00000, 0x40000123, 0xD0000000, REAL_DATA])))
    def translate(self, gva: int) -> None:
        if self.healthy:
            self.pair.ioctl("vcpu", "KVM_TRANSLATE", linear_address=gva)

    @rule(fields=st.lists(st.sampled_from(["nent", "odd"]), max_size=1))
    def cpuid_again(self, fields: list[str]) -> None:
        def get(side: Any) -> Any:
            argument = HeaderAndEntries(v.kvm_cpuid2, v.kvm_cpuid_entry2, 200)
            argument.header.nent = 3 if fields == ["nent"] else 200
            result = side.vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, ctypes.addressof(argument.header))
            return result, argument.header.nent

        self.pair.see("KVM_GET_CPUID2", get, what="KVM_GET_CPUID2")

    @rule()
    def run(self) -> None:
        self.good_sregs(0, 0, 0, 0) if not self.healthy else None
        rip, rsp = (CODE, STACK) if self.long else (REAL_CODE, REAL_CODE)

        def go(side: Any) -> Any:
            side.regs(rip=rip, rsp=rsp, rflags=2)
            return {"exit": words_of(side.run()), **fields_of(side.vcpu.get_regs())}

        self.pair.ioctl("vcpu", "KVM_SET_DEBUGREGS", dr6=0xFFFF0FF0, dr7=0x400)
        self.pair.ioctl("vcpu", "KVM_SET_FPU", fcw=0x37F, mxcsr=0x1F80)  # a host may drop what an empty x87 register holds
        self.pair.see("KVM_RUN", go, what="KVM_RUN")
        self.everything()


@pytest.mark.kvm
def test_vcpu_state(drive: Callable[..., None]) -> None:
    drive(State, 60, 15, cpuid=common_cpuid())
