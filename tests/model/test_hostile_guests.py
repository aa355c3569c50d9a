"""Guests that mean harm: random bytes as code, code that the engine cannot translate, tables that loop, two vCPUs against each
other. Each run ends in an exit or a kick; no exception, no crash of the process. (`scripts/fuzz snippets` makes many more.)
"""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi.vcpu import kvm_regs
from kvmapi.exits import Hlt, Intr, Io, Shutdown
from tests.conformance.snippets import CODE, DATA, IDT, PD_LOW, PDPT, PML4, STACK, LongGuest, RealGuest, code
from tests.conftest import PATIENCE

pytestmark = pytest.mark.model
PROGRAM = """
import collections, faulthandler, random, sys, threading
faulthandler.enable()
sys.path.insert(0, {tree!r})
from kvmapi.model.host import ModelHost
from kvmapi.exits import Exit
from tests.conformance.snippets import CODE, DATA, LongGuest
from tests.model.sev_guest import SevGuest

host = ModelHost()
rng = random.Random({seed})
# Half of the bytes are random, half come from pieces that reach further than random bytes do.
PIECES = [bytes.fromhex(text) for text in (
    "0f22c0 0f22d8 0f22e0 0f20c0 0f01d9 0f01c1 0f30 0f32 0fa2 f4 e610 ef 6e f36e f36c cd14 0f0b cf 0f01f8 0f05 0f07 0f34 0f35"
    " f30f01e8 0fae00 0fae08 8ed8 0f00d8 0f0118 0f0110 c3 ff23 48ff2b 0fc7 f00fc10b 8b03 8903 668cd8 0f09 0f08 0f7800"
).split()]
count = collections.Counter()
for number in range({snippets}):
    text = b""
    while len(text) < 64:
        text += rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 6))
    guest = (SevGuest if number % 4 == 0 else LongGuest)(host, text[:64])
    with guest:
        values = {name: rng.choice([0, 1, DATA, CODE, 0xD0000000, 0x40030000, 0x3FE00000, 1 << 47, (1 << 64) - 8, 0xC0000080, 0x10])
                  for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8")}
        guest.regs(rip=CODE, **values)
        timer = threading.Timer(0.02, guest.vcpu.request_exit)
        timer.start()
        for _ in range(20):
            error = guest.vcpu.run()
            exit = guest.vcpu.exit(error)
            assert isinstance(exit, Exit), exit
            count[exit.name] += 1
            if error or exit.name in ("SHUTDOWN", "INTERNAL_ERROR", "HLT"):
                break
        timer.cancel()
        timer.join()
        guest.vcpu.request_exit(False)
        guest.regs()
        guest.vcpu.get_sregs()
print(dict(count))
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_random_code(tree: Path, seed: int) -> None:
    program = PROGRAM.replace("{tree!r}", repr(str(tree))).replace("{seed}", str(seed)).replace("{snippets}", "150")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60 * PATIENCE, cwd=tree, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


ABORTING = ("f00fb3c6", "f00fa3c0", "f00fabd8", "f048 0fbbc1", "f0660fbae803", "66f00fbafa01", "f0410fb3c0", "41f00fb3c6")
"""Bit tests of registers with LOCK: the engine's code generator aborts the process at these."""

ONE = """
import sys
sys.path.insert(0, {tree!r})
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import LongGuest, CODE
for number, text in enumerate({texts!r}):
    for before in (b"", b"\\x90" * 3, b"\\xeb\\x00"):
        for step in (False, True):
            with LongGuest(ModelHost(), before + bytes.fromhex(text) + b"\\xf4") as guest:
                if step:
                    guest.vcpu.set_guest_debug(3)
                for _ in range(12):
                    exit = guest.run()
                    if exit.name == "HLT":
                        break
                print(text, exit.name, guest.vector() if exit.name == "HLT" else hex(guest.regs().rip))
                assert exit.name == "HLT" and guest.vector() == 6, (text, exit)
"""


def test_code_that_the_engine_cannot_translate(tree: Path) -> None:
    """#UD, as on a processor, also behind other instructions, behind a jump, and in single steps."""
    program = ONE.replace("{tree!r}", repr(str(tree))).replace("{texts!r}", repr(ABORTING))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60 * PATIENCE, cwd=tree, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def test_locked_instructions_that_are_allowed_run(model_host: Any) -> None:
    text = code("f048 0fb10b f0480fc10b f0830301 f0480fba2b07 f4".replace(" ", ""),
                "lock cmpxchg [rbx], rcx; lock xadd [rbx], rcx; lock add dword ptr [rbx], 1; lock bts qword ptr [rbx], 7; hlt")  # fmt: skip
    with LongGuest(model_host, text) as guest:
        guest.regs(rbx=DATA, rcx=5, rax=0)
        assert guest.run() == Hlt() and guest.regs().rip == CODE + len(text)
        assert struct.unpack("<Q", guest.get(DATA, 8)) == (10 + 1 | 1 << 7,)


def test_an_instruction_that_is_sensitive_in_another_width_only(model_host: Any) -> None:
    """INC CX; OUT DX, AL of 16-bit code begins like an OUT with a REX prefix."""
    with RealGuest(model_host, bytes.fromhex("41eef4")) as guest:
        kick = threading.Timer(5, guest.vcpu.request_exit)
        kick.start()
        exit = guest.run()
        kick.cancel()
        assert isinstance(exit, Io) and guest.regs().rcx == 1


def test_code_that_user_space_changes_again_and_again(model_host: Any) -> None:
    """Each change drops hooks on the pages that changed; none is forgotten in the engine, where it would stop the guest for ever."""
    with LongGuest(model_host, b"") as guest:
        for number in range(200):
            sensitive = bytes.fromhex("0fa2" if number % 2 else "0f32")
            guest.put(CODE, b"\x90" * (number % 7) + b"\x50" * 3 + (b"\xeb\x02" + sensitive if number % 3 else b"\x90" * 4) + b"\xf4")
            kick = threading.Timer(5, guest.vcpu.request_exit)
            kick.start()
            exit = guest.again()
            kick.cancel()
            assert exit == Hlt(), f"change {number}: {exit}"


@pytest.mark.parametrize(("text", "name"), [("e610", "IO"), ("f4", "HLT"), ("0fa2ee", "IO")])
def test_a_sensitive_instruction_first_in_a_page(model_host: Any, text: str, name: str) -> None:
    """Reached from the page before, in one block with what stands there."""
    with LongGuest(model_host, b"") as guest:
        guest.put(CODE + 0xFFE, b"\x90\x90" + bytes.fromhex(text) + b"\xf4")
        guest.regs(rip=CODE + 0xFFE, rdx=0x10)
        exit = guest.run()
        assert exit.name == name and guest.regs().rip in (CODE + 0x1000, CODE + 0x1001, CODE + 0x1002)


@pytest.mark.parametrize("length", [0x80000000, 1 << 63, 0x180000000, 5, (1 << 64) - 3])
def test_lengths_of_pcmpestri(tree: Path, length: int) -> None:
    """A length of which the absolute value is no number of the engine's."""
    program = (
        f"import sys; sys.path.insert(0, {str(tree)!r})\n"
        "from kvmapi.model.host import ModelHost\nfrom tests.conformance.snippets import LongGuest\n"
        "for text in ('660f3a60c100', '660f3a61c102', '66480f3a60c103', '66480f3a61c103'):\n"
        f"    with LongGuest(ModelHost(), bytes.fromhex(text) + b'\\xf4') as guest:\n"
        f"        guest.regs(rax={length}, rdx={length})\n"
        f"        assert guest.run().name == 'HLT' and guest.regs().rax == {length}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60 * PATIENCE, cwd=tree, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


LOAD = code("488b03f4", "mov rax, [rbx]; hlt")


def test_tables_that_contain_themselves(model_host: Any) -> None:
    """A PML4 entry that points at the PML4 shows the tables as data: the walk ends after four levels, wherever it goes."""
    with LongGuest(model_host, LOAD) as guest:
        guest.put(PML4 + 8 * 511, struct.pack("<Q", PML4 | 3))
        for level, expected in enumerate((PML4, PML4, PML4, PML4)):
            address = (1 << 64) - (1 << 12 + 9 * level) + 8 * 511 if level == 0 else (1 << 64) - 8
            assert guest.again(rbx=address) == Hlt()
            assert guest.regs().rax & ~0x60 == expected | 3, level


def test_a_table_that_points_at_its_parent(model_host: Any) -> None:
    """PDPT[2] is the PML4 used as a page directory, so that PDPT is a page table and PD_LOW a page."""
    with LongGuest(model_host, LOAD) as guest:
        guest.put(PDPT + 8 * 2, struct.pack("<Q", PML4 | 3))
        assert guest.again(rbx=2 << 30) == Hlt()
        assert guest.regs().rax & ~0x60 == 0x83 and struct.unpack("<Q", guest.get(PD_LOW, 8))[0] & ~0x60 == 0x83


@pytest.mark.parametrize("entry", [PML4 | 0x83, 1 << 51 | PD_LOW | 3, 1 << 47 | 3, (1 << 64) - 1])
def test_tables_with_reserved_bits_or_outside_memory(model_host: Any, entry: int) -> None:
    """#PF with the reserved bit, or an exit because the table is not there; never anything else."""
    with LongGuest(model_host, LOAD) as guest:
        guest.put(PML4 + 8, struct.pack("<Q", entry))
        exit = guest.again(rbx=1 << 39)
        assert exit.name in ("HLT", "INTERNAL_ERROR", "MMIO")
        if exit == Hlt():
            assert guest.vector() == 14 and guest.frame().error == (
                0 if entry == 1 << 47 | 3 else 9
            )  # memory that is not there is all zeroes


@pytest.mark.parametrize(("target", "vector"), [(1 << 47, 13), (0x3FF00000, 14), ((1 << 63) + 5, 13), (DATA, 3)])
def test_jumps_to_nowhere(model_host: Any, target: int, vector: int) -> None:
    with LongGuest(model_host, code("ffe3", "jmp rbx")) as guest:
        guest.put(DATA, b"\xcc")
        assert guest.again(rbx=target) == Hlt() and guest.vector() == vector


@pytest.mark.parametrize("what", ["no idt", "no stack", "handler that faults"])
def test_triple_faults(model_host: Any, what: str) -> None:
    with LongGuest(model_host, code("0f0b", "ud2")) as guest:
        values = {}
        if what == "no idt":
            guest.put(IDT, bytes(512))
        elif what == "no stack":
            values["rsp"] = 1 << 50
        else:
            for vector in (6, 8, 13, 14):
                guest.set_gate(vector, 1 << 47)
            guest.put(IDT + 16 * 8, bytes(16))
        exit = guest.again(**values)
        if what == "handler that faults" and exit == Hlt():
            pytest.fail("a handler at a non-canonical address was entered")
        assert exit == Shutdown()


def test_a_vcpu_that_rewrites_the_other_ones_code_and_tables(model_host: Any) -> None:
    """vCPU 1 fills code and tables of vCPU 0 with random words while that runs: both can be stopped at any time."""
    fill = code("890f 69c9 0d661900 81c1 5ff36e3c 4883c704 6681e7ff0f 4809d7 ebe7".replace(" ", ""),
                "mov [rdi], ecx; imul ecx, ecx, 0x19660d; add ecx, 0x3c6ef35f; add rdi, 4; and di, 0xfff; or rdi, rdx; "
                "jmp .-0x17")  # fmt: skip
    for target in (CODE, PML4, PDPT, PD_LOW, IDT):
        with LongGuest(model_host, code("ebfe", "jmp .") + b"\xf4", vcpus=2) as guest:
            guest.put(DATA, fill)
            guest.vcpus[1].set_regs(kvm_regs(rip=DATA, rsp=STACK - 0x800, rflags=2, rdi=target, rdx=target & -0x1000, rcx=target))
            threads = [threading.Thread(target=guest.vcpus[number].run) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(0.1)
            for vcpu in guest.vcpus:
                vcpu.request_exit()
            for thread in threads:
                thread.join(10 * PATIENCE)
                assert not thread.is_alive()
            for vcpu in guest.vcpus:
                assert vcpu.run() == 4 and vcpu.exit(4) == Intr()


@pytest.mark.parametrize(
    "text", ["c5f8a2", "c4e178a2", "c5f822d8", "c5f830", "c5f831", "c5f805", "c5f1fcc2", "66c5f8a2", "c5f8ee", "c4e2711cc2"]
)
def test_vex_prefixes_are_not_offered(model_host: Any, text: str) -> None:
    """#UD, and nothing privileged is executed unseen."""
    with LongGuest(model_host, bytes.fromhex(text) + b"\xf4") as guest:
        guest.regs(rcx=0x10, rax=0, rdx=0)
        assert guest.run() == Hlt() and guest.vector() == 6
