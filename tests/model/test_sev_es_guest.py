"""An SEV-ES guest runs on the model: what raises #VC in it and what does not, where it starts, what ends KVM_RUN. Interrupts,
NMIs and other processors are in test_sev_es_events.py.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.abi import vcpu as v
from kvmapi.exits import FailEntry, Hlt, Io, Shutdown
from kvmapi.model.host import ModelHost
from kvmapi.model.msr_filter import MsrFilter
from kvmapi.model.platform import Platform
from tests.conformance.snippets import CODE, STACK, code
from tests.model.es_code import CELL, REPORT, EsCode
from tests.model.es_guest import BOTH, PLAIN, SEV_ES

pytestmark = pytest.mark.model
VC = 29
USER_CODE, USER_STACK = 0x2B, 0x23
STORE_RAX = code("49be0010064000000000 498906 49895608 f4", "movabs r14, 0x40061000; mov [r14], rax; mov [r14+8], rdx; hlt")


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


def vc(host: ModelHost, text: bytes, type: int = SEV_ES, **options: Any) -> tuple[int, int, int]:
    """Run it: the vector that was raised, its first two words (error code and RIP, where there is an error code)."""
    with EsCode(host, text, type, **options) as guest:
        exit_ = guest.run()
        assert exit_ == Hlt(), exit_
        report = guest.report()
        return report.vector, report.words[0], report.words[1]


# ---- what is intercepted
INTERCEPTED = [
    (code("0fa2", "cpuid"), 0x72),
    (code("66480fa2", "data16 rex.w cpuid"), 0x72),
    (code("e410", "in al, 0x10"), 0x7B),
    (code("66ef", "out dx, ax"), 0x7B),
    (code("f36c", "rep insb"), 0x7B),
    (code("6e", "outsb"), 0x7B),
    (code("0f01d9", "vmmcall"), 0x81),
    (code("0f33", "rdpmc"), 0x6F),
    (code("0f09", "wbinvd"), 0x89),
    (code("0f08", "invd"), 0x76),
    (code("0f01c8", "monitor"), 0x8A),
    (code("0f01c9", "mwait"), 0x8B),
    (code("0f21f8", "mov rax, dr7"), 0x27),
    (code("0f21e8", "mov rax, dr5"), 0x27),
    (code("0f23f8", "mov dr7, rax"), 0x37),
    (code("0f23e8", "mov dr5, rax"), 0x37),
    (code("0f01d8", "vmrun"), 0x80),
    (code("0f01df", "invlpga"), 0x7A),
]


@BOTH
@pytest.mark.parametrize(("text", "exit_code"), INTERCEPTED, ids=lambda value: value.hex() if isinstance(value, bytes) else hex(value))
def test_what_kvm_intercepts_raises_vc(host: ModelHost, type: int, text: bytes, exit_code: int) -> None:
    assert vc(host, text + b"\xf4", type) == (VC, exit_code, CODE)


MSRS = [(0x10, True), (0x1B, True), (0x1A0, True), (0xC0000103, True), (0x40000ABC, True), (0xC0010132, True)]
MSRS += [(number, False) for number in (0xC0000080, 0x277, 0xC0000081, 0xC0000082, 0xC0000101, 0xC0000102, 0x174, 0x1D9, 0xC0010131)]
RDMSR = code("0f32", "rdmsr") + STORE_RAX


@pytest.mark.parametrize(("number", "intercepted"), MSRS, ids=str)
def test_reading_msrs(host: ModelHost, number: int, intercepted: bool) -> None:
    with EsCode(host, RDMSR, registers={"rcx": number}) as guest:
        assert guest.run() == Hlt()
        if intercepted:
            assert guest.report()[:2] == (VC, (0x7C, CODE, 8, 2)) or guest.report().words[:2] == (0x7C, CODE)
        else:
            assert guest.report().vector == 0, "nothing was raised"
            expected = {0xC0000080: 0x1D01, 0x277: 0x00070406, 0xC0010131: 0b11}.get(number, 0)
            assert guest.words(CELL)[0] == expected


def test_writing_msrs(host: ModelHost) -> None:
    text = code("0f30 0f32", "wrmsr; rdmsr") + STORE_RAX
    for number in (0xC0000082, 0xC0010130, 0x1DB):
        with EsCode(host, text, registers={"rcx": number, "rax": 0x12345678, "rdx": 0x1000}) as guest:
            assert guest.run() == Hlt() and guest.words(CELL, 2) == (0x12345678, 0x1000)
    assert vc(host, text, registers={"rcx": 0xC0010131})[:2] == (VC, 0x7C), "SEV_STATUS can be read only"
    assert vc(host, text, registers={"rcx": 0xC0000080, "rax": 1 << 20})[:2] == (13, 0)
    with EsCode(host, text, registers={"rcx": 0xC0000080, "rax": 0xD01}) as guest:
        assert guest.run() == Hlt() and guest.words(CELL)[0] == 0x1D01, "SVME stays"


def test_a_filter_takes_an_msr_from_the_guest(host: ModelHost) -> None:
    with EsCode(host, RDMSR, registers={"rcx": 0xC0000082}) as guest:

        class Deny(MsrFilter):
            def __init__(self) -> None:
                pass

            def allows(self, number: int, access: int) -> bool:
                return number != 0xC0000082

        guest.file().vm.exits.msr_filter = Deny()
        assert guest.run() == Hlt() and guest.report().words[:2] == (0x7C, CODE)


# ---- what is not
FREE = [
    (code("0f31", "rdtsc"), {}),
    (code("0f01f9", "rdtscp"), {}),
    (code("0f20c0 0f22c0", "mov rax, cr0; mov cr0, rax"), {}),
    (code("0f20e0 0f22e0", "mov rax, cr4; mov cr4, rax"), {}),
    (code("0f20d8 0f22d8", "mov rax, cr3; mov cr3, rax"), {}),
    (code("b805000000 440f22c0 b800000000 440f22c0", "mov eax, 5; mov cr8, rax; mov eax, 0; mov cr8, rax"), {}),
    (code("0f0138", "invlpg [rax]"), {}),
    (code("0f23c0 0f21c0", "mov dr0, rax; mov rax, dr0"), {}),
    (code("0f21f0", "mov rax, dr6"), {}),
]


@pytest.mark.parametrize(("text", "registers"), FREE, ids=[text.hex() for text, _ in FREE])
def test_what_is_not_intercepted_executes(host: ModelHost, text: bytes, registers: dict[str, int]) -> None:
    with EsCode(host, text + STORE_RAX, registers={"rax": 0x12340, **registers}) as guest:
        assert guest.run() == Hlt() and guest.report().vector == 0


def test_debug_swap_gives_the_guest_its_debug_registers() -> None:
    text = code("b805040000 0f23f8 0f21f8", "mov eax, 0x405; mov dr7, rax; mov rax, dr7") + STORE_RAX
    with EsCode(ModelHost(Platform(debug_swap=True)), text, features=1 << 5) as guest:
        assert guest.run() == Hlt() and guest.words(CELL)[0] == 0x405
    step = code("9c 810c2400010000 9d 90 90 f4", "pushf; or dword ptr [rsp], 0x100; popf; nop; nop; hlt")
    assert vc(ModelHost(Platform(debug_swap=True)), step, features=1 << 5)[0] == 1
    assert vc(ModelHost(), step)[:2] == (VC, 0x41), "KVM intercepts #DB without it"


@pytest.mark.parametrize(
    ("text", "vector"),
    [
        (code("cc", "int3"), 3),
        (code("cd01", "int 1"), 1),
        (code("0f0b", "ud2"), 6),
        (code("0f01c1", "vmcall"), 6),
        (code("488b0425ffffffff", "mov rax, [-1]"), 14),
    ],
)
def test_other_exceptions_are_the_guests(host: ModelHost, text: bytes, vector: int) -> None:
    with EsCode(host, text + b"\xf4") as guest:
        assert guest.run() == Hlt() and guest.report().vector == vector


# ---- privilege comes first
USER = code(
    "6a23 6800000500 6a02 6a2b 48c7c000010100 50 48cf",
    "push 0x23; push 0x50000; push 2; push 0x2b; mov rax, 0x10100; push rax; iretq",
)


class UserCode(EsCode):
    """The text runs at CPL 3, in shared and private pages that user code may use."""

    def __init__(self, host: ModelHost, text: bytes, **options: Any) -> None:
        self.user = text
        super().__init__(host, USER, **options)

    def before_launch(self) -> None:
        self.put(CODE + 0x100, self.user)
        for table, index in ((0x1000, 0), (0x2000, 0), (0x3000, 0)):
            entry = struct.unpack("<Q", self.get(table + 8 * index, 8))[0]
            self.put(table + 8 * index, struct.pack("<Q", entry | 4))
        self.put(
            0x6000, struct.pack("<7Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x8B0000000067 | 0x8000 << 16, 0, 0x00AFFB000000FFFF, 0)
        )
        self.put(0x6000 + 0x20, struct.pack("<2Q", 0x00CFF3000000FFFF, 0x00AFFB000000FFFF))
        self.put(0x8000 + 4, struct.pack("<Q", STACK))
        self.put(0x8000 + 0x66, b"\xff\xff")  # no bitmap of ports
        sregs = self.vcpu.get_sregs()
        sregs.gdt.limit = 0x2F
        self.vcpu.set_sregs(sregs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (code("0fa2", "cpuid"), (VC, 0x72)),
        (code("0f01d9", "vmmcall"), (VC, 0x81)),
        (code("e410", "in al, 0x10"), (13, 0)),
        (code("0f32", "rdmsr"), (13, 0)),
        (code("0f09", "wbinvd"), (13, 0)),
        (code("0f33", "rdpmc"), (13, 0)),
        (code("0f21f8", "mov rax, dr7"), (13, 0)),
        (code("f4", "hlt"), (13, 0)),
        (code("0f01d8", "vmrun"), (13, 0)),
        (code("0f01c8", "monitor"), (6, CODE + 0x100)),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else "",
)
def test_user_code_faults_before_it_is_intercepted(host: ModelHost, text: bytes, expected: tuple[int, int]) -> None:
    with UserCode(host, text + b"\xeb\xfe") as guest:
        assert guest.run() == Hlt()
        report = guest.report()
        assert (report.vector, report.words[0]) == expected


# ---- memory without memory
@BOTH
@pytest.mark.parametrize(
    "text", [code("488b03", "mov rax, [rbx]"), code("8803", "mov [rbx], al"), code("ff03", "inc dword ptr [rbx]"), code("ffe3", "jmp rbx")]
)
def test_mmio_is_vc(host: ModelHost, type: int, text: bytes) -> None:
    vector, error, rip = vc(host, text + b"\xf4", type, registers={"rbx": 0xD0000010})
    assert (vector, error) == (VC, 0x400) and rip == (0xD0000010 if text == b"\xff\xe3" else CODE)


def test_nothing_to_deliver_it_with_is_a_shutdown(host: ModelHost) -> None:
    class NoTable(EsCode):
        def before_launch(self) -> None:
            sregs = self.vcpu.get_sregs()
            sregs.idt.base = 0xD0000000
            self.vcpu.set_sregs(sregs)

    with NoTable(host, code("0fa2", "cpuid")) as guest:
        assert guest.run() == Shutdown()


def test_a_triple_fault_is_a_shutdown(host: ModelHost) -> None:
    class NoTable(EsCode):
        def before_launch(self) -> None:
            sregs = self.vcpu.get_sregs()
            sregs.idt.limit = 0
            self.vcpu.set_sregs(sregs)

    with NoTable(host, code("0fa2", "cpuid")) as guest:
        assert guest.run() == Shutdown()


# ---- where it starts
def test_the_guest_starts_from_its_vmsa(host: ModelHost) -> None:
    text = code("0f20d0 0f20e2", "mov rax, cr2; mov rdx, cr4") + STORE_RAX
    with EsCode(host, text) as guest:
        file = guest.file()
        assert file.protected is not None
        assert guest.run() == Hlt() and guest.words(CELL, 2) == (0, 0x660), "no CR2, and the host's MCE"


@pytest.mark.parametrize(("type", "mxcsr"), [(SEV_ES, 0x1F80), (PLAIN, 0)])
def test_the_legacy_type_has_no_floating_point_state(host: ModelHost, type: int, mxcsr: int) -> None:
    text = code("50 0fae1c24 8b0424 6a00 d93c24 5a", "push rax; stmxcsr [rsp]; mov eax, [rsp]; push 0; fnstcw [rsp]; pop rdx") + STORE_RAX
    with EsCode(host, text, type) as guest:
        assert guest.run() == Hlt() and guest.words(CELL)[0] == mxcsr
        assert guest.words(CELL + 8)[0] & ~0x40 == (0x33F if type == SEV_ES else 0), "of which one bit reads as 1 always"


def test_a_vcpu_that_was_not_launched_is_not_entered(host: ModelHost) -> None:
    with EsCode(host, code("f4", "hlt")) as guest:
        late = guest.add_vcpu()
        assert late.exit(late.run()) == FailEntry((1 << 64) - 1, 0)
        assert guest.run() == Hlt()


def test_what_kvm_is_told_of_control_registers(host: ModelHost) -> None:
    """Their writes are trapped: the legacy type's KVM_GET_SREGS follows them."""
    text = code(
        "0f20c0 0d00000400 0f22c0 0f20e0 4883c804 0f22e0 f4",
        "mov rax, cr0; or eax, 0x40000; mov cr0, rax; mov rax, cr4; or rax, 4; mov cr4, rax; hlt",
    )
    with EsCode(host, text, PLAIN) as guest:
        before = guest.vcpu.get_sregs()
        assert guest.run() == Hlt()
        after = guest.vcpu.get_sregs()
        assert (after.cr0, after.cr4) == (before.cr0 | 0x40000, before.cr4 | 0x44) and after.efer == before.efer
        assert after.cr3 == 0


# ---- nothing leaks
def test_registers_stay_the_guests(host: ModelHost) -> None:
    secret = {f"r{n}": 0x5EC0DE00 + n for n in range(8, 16)} | {"rbx": 0x5EC0DE}
    with EsCode(host, code("e610 f4", "out 0x10, al; hlt"), PLAIN, registers=secret) as guest:
        guest.vcpu.set_regs(v.kvm_regs(rip=1))
        assert guest.run() == Hlt() and guest.report().words[:2] == (0x7B, CODE)
        assert not any(number in bytes(guest.vcpu.get_regs()) for number in (b"\x5e\xc0", b"\xde\xc0"))
        assert guest.get(REPORT, 8) == (29).to_bytes(8, "little") and not isinstance(guest.run(), Io)
