"""Blocks that would take more of the engine's translator than it has: lengths and leaks of instructions against the engine, the
cuts against every chain that a page holds, and hostile guests in a child process, as the engine would take ours with it.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmapi.model.cpu import blocks, hazards
from kvmapi.model.cpu.lengths import WIDTHS
from tests.conftest import PATIENCE
from tests.model.translator import Translator

pytestmark = pytest.mark.model
PAGE = 4096
OWN, ROOM = 36, 512  # temporaries of the translator that stand for registers; all there are
JUMP = b"\xeb\xfe"
HEX = """
    d8c1 d9c0 ded9 df db28 d9 dd00 dbe8 0f3a0f 660f3a0f 660f3a14 0f70 0fc6 0fc2 8ee0 8ec0 07 1f 66 67 f2 f3 f0 48 41 4f 64 0f f3a4 c8 c5f8
    c4e3 c4e2 c4 c5 62 f20f38f0 cd b0 48b8 66b8 a1 67a1 90 50 0fa4 f30fd6 660f78 f20f78 0f71 0f50 0fb4 0fa1 0f20c0 ce d40a f7 f6 81 69 8d04
"""
PIECES = [bytes.fromhex(text) for text in HEX.split()]
WIDTH = pytest.mark.parametrize("bits", [64, 32, 16])


def soup(rng: random.Random, size: int) -> bytes:
    """Prefixes and opcodes that matter here, and random bytes."""
    text = b""
    while len(text) < size:
        text += rng.choice(PIECES) if rng.random() < 0.6 else rng.randbytes(rng.randrange(1, 5))
    return text[:size]


@pytest.fixture
def translator(bits: int) -> Iterator[Translator]:
    made = Translator(bits)
    yield made
    made.close()


def run(tree: Path, program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60 * PATIENCE, cwd=tree, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


# ---- lengths and leaks, against the engine
@WIDTH
def test_lengths_and_leaks_are_the_engines(translator: Translator, bits: int) -> None:
    """Blocks of many instructions: the last one begins where we say that it does, and no more leaks than we say."""
    rng, width, seen = random.Random(bits), WIDTHS[bits], 0
    for _ in range(6000):
        text = soup(rng, rng.choice((4, 12, 60))) + b"\x90" * 15 + JUMP
        if hazards.fatal(text, len(text)):
            continue
        instructions, size, used = translator.block(text)
        at = leaked = 0
        padded = text + bytes(40)
        for _ in range(instructions - 1):
            length, leak = width.decode(padded, at)
            assert length, f"{text.hex()}: a block of {instructions} instructions ends at {at}?"
            at, leaked, seen = at + length, leaked + leak, seen + 1
        assert at < size <= at + 15, text.hex()  # the last one may have been refused half-way
        assert used <= OWN + 23 + leaked, f"{text.hex()}: {used} temporaries, of which {leaked} by instructions"
    assert seen > 20_000


@WIDTH
def test_lengths_of_every_opcode(translator: Translator, bits: int) -> None:
    """Every opcode of the four maps with operands of each kind: one instruction, then NOPs up to a jump."""
    width, checked = WIDTHS[bits], 0
    for table in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a", b"\xc5\xf8", b"\xc5\xfb"):
        for opcode in range(256):
            for prefix in (b"", b"\x66", b"\xf3", b"\x67", b"\x48"):
                for modrm in (0x05, 0x43, 0x84, 0xC1, 0xD8, 0x30):
                    text = prefix + table + bytes((opcode, modrm)) + b"\x90" * 24 + JUMP
                    instructions, size, _ = translator.block(text)
                    length, _ = width.decode(text + bytes(40), 0)
                    if instructions > 1 and size == len(text):
                        rest, at = instructions - 1, length
                        while rest > 1:
                            more, _ = width.decode(text + bytes(40), at)
                            at, rest = at + more, rest - 1
                        assert length and at == len(text) - 2, f"{text.hex()}: {length}"
                        checked += 1
    assert checked > 10_000


@WIDTH
@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("d8c1", 2),
        ("dd00", 1),
        ("660f3a0fc104", 1),
        ("0f70c000", 1),
        ("0fc6c000", 1),
        ("660f78c00101", 2),
        ("8ee0", 1),
        ("01c8", 0),
        ("0f58c1", 0),
    ],
)
def test_leaks(translator: Translator, bits: int, text: str, leak: int) -> None:
    """What leaks, and how much: the difference that 100 more make."""
    assert text and bits
    few, many = (translator.block(bytes.fromhex(text) * number + JUMP)[2] for number in (20, 120))
    assert many - few == 100 * leak


def test_the_room_that_blocks_have() -> None:
    """What the test above allows a block beside leaks, a hook's two, an exit's one and the last instruction's two."""
    assert blocks.LIMIT + OWN + 23 + 2 + 1 + 2 <= ROOM


# ---- the cuts
def worst(code: bytes, bits: int, cut: set[int], starts: range) -> list[tuple[int, bool]]:
    """Of the chains from `starts`: what each leaks in the page, and whether it leaves it. Forwards, one by one."""
    padded, found = code + bytes(40), []
    for start in starts:
        at, leaked = start, 0
        while at < PAGE and (at == start or at not in cut):
            length, leak = WIDTHS[bits].decode(padded, at)
            if not length:
                break
            leaked, at = leaked + leak, at + length
        found.append((leaked, at >= PAGE))
    return found


@WIDTH
@pytest.mark.parametrize("seed", range(6))
def test_no_chain_leaks_more_than_it_may(bits: int, seed: int) -> None:
    """From every offset of pages that are dense with what leaks: with and without prefixes, one stream and several."""
    rng = random.Random(seed)
    dense = [
        bytes.fromhex(text) for text in ("d8c1", "dec1", "64d8c1", "660f3a0fc104", "0f70c1d8", "8ee0", "d9d8", "3e36d8c1", "f3660f70c004")
    ]
    chosen = rng.sample(dense, rng.randrange(1, 4))
    code = b"".join(rng.choice(chosen) for _ in range(PAGE))[: PAGE + 14]
    if seed % 3 == 2:
        code = bytes(rng.choice(b"\xd8\xd9\xdd\x64\xc1\xc0") for _ in range(PAGE + 14))
    found = blocks.cuts(code, PAGE, bits)
    assert found and min(found) > 0 and max(found) < PAGE
    chains = worst(code, bits, found, range(PAGE))
    assert max(leaked for leaked, leaves in chains if not leaves) <= blocks.LIMIT
    assert max((leaked for leaked, leaves in chains if leaves), default=0) <= blocks.SHARE
    assert max(leaked for leaked, _ in chains[:15]) <= blocks.SHARE


@WIDTH
def test_pages_between_the_stages(bits: int) -> None:
    """So much that leaks that only the ends of the page matter: at either end it is cut, in the middle it is not."""
    run_of = b"\xd8\xc1" * (blocks.SHARE // 2 + 20)
    quiet = b"\xc3" * (PAGE - len(run_of))
    for page, expected in ((quiet + run_of, True), (run_of + quiet, True), (quiet[:700] + run_of + quiet[700:], False)):
        code = page + b"\xd8\xc1" * 7
        assert blocks.SHARE < blocks.count(code)[bits] <= blocks.LIMIT
        found = blocks.cuts(code, PAGE, bits)
        assert bool(found) == expected
        chains = worst(code, bits, found, range(PAGE))
        assert max((leaked for leaked, leaves in chains if leaves), default=0) <= blocks.SHARE
        assert max(leaked for leaked, _ in chains[:15]) <= blocks.SHARE


@WIDTH
def test_the_count_is_an_upper_bound(bits: int) -> None:
    rng = random.Random(bits)
    for _ in range(20):
        code = soup(rng, PAGE)
        assert max(leaked for leaked, _ in worst(code, bits, set(), range(PAGE))) <= blocks.count(code)[bits]


def test_ordinary_code_has_no_cuts() -> None:
    """The interpreter that runs this: its code, a page here and there."""
    image = Path(sys.executable).resolve().read_bytes()
    for at in range(len(image) // 4, len(image) // 2, len(image) // 64 & -PAGE or PAGE):
        page = image[at : at + PAGE]
        if len(page) == PAGE:
            assert not blocks.cuts(page, PAGE, 64)


# ---- hostile guests, each in a child process
HOSTILE = """
import random, sys, threading
sys.path.insert(0, {tree!r})
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import CODE, DATA, REAL_CODE, REAL_DATA, LongGuest, RealGuest
{imports}
def run(kind, code, data, text, start=0, **more):
    with kind(ModelHost(), b"") as guest:
        guest.put(code, text)
        guest.regs(rip=code + start, rbx=data, rdi=data, rsi=data, rcx=1, **more)
        timer = threading.Timer(20, guest.vcpu.request_exit)
        timer.start()
        exit = guest.run()
        timer.cancel()
        return exit.name, guest.regs().rip - code
long, real = (LongGuest, CODE, DATA), (RealGuest, REAL_CODE, REAL_DATA)
{body}
"""


def hostile(tree: Path, body: str, imports: str = "") -> str:
    return run(tree, HOSTILE.replace("{tree!r}", repr(str(tree))).replace("{imports}", imports).replace("{body}", body))


@pytest.mark.parametrize("kind", ["long", "real", "protected"])
@pytest.mark.parametrize("text", ["d8c1", "dd03", "660f3a0fc104", "0f70c000", "66d8c1", "d8c10f70c004", "3e2ed8c1"])
def test_long_runs(tree: Path, kind: str, text: str) -> None:
    """8 KiB of a kind, also from somewhere near the end of the first page: all are executed, up to HLT."""
    imports, name = "", kind
    if kind == "protected":
        imports = "from tests.conformance.protected import CODE as PCODE, ProtectedGuest\nprotected = (ProtectedGuest, PCODE, 0x30000)"
    if kind != "long":
        text = text.replace("660f3a", "0f3a")  # MMX: these have no SSE
    body = (
        f"text = bytes.fromhex({text!r})\nsize = 8192 // len(text) * len(text)\nfor start in (0, 4000 // len(text) * len(text)):\n"
        f"    end = run(*{name}, text * (size // len(text)) + b'\\xf4', start)\n"
        "    assert end == ('HLT', size + 1), (start, end)\n"
    )
    hostile(tree, body, imports)


def test_random_runs(tree: Path) -> None:
    """Dense with what leaks, entered anywhere: any end but that of the process."""
    body = (
        "rng = random.Random(7)\n"
        "GOOD = [bytes.fromhex(t) for t in 'd8c1 d9c0 dec1 0f3a0fc104 0f70c104 64d8c1 66d8c1'.split()]\n"
        "BAD = [bytes.fromhex(t) for t in 'd9 d8 0f3a 66 8ee0 660f3a0fc104'.split()]\n"
        "for number in range(40):\n"
        "    text = b''.join(rng.choice(GOOD if rng.random() < 1 - number % 4 / 50 else BAD) for _ in range(4000))[:9000] + b'\\xf4'\n"
        "    print(run(*(long if number % 2 else real), text, rng.randrange(4096)))\n"
    )
    assert len(hostile(tree, body).splitlines()) == 40


def test_a_run_that_is_stored_and_then_entered(tree: Path) -> None:
    """The guest writes the run itself (REP STOSW), and jumps there: cuts come with the scan of what stands there then."""
    body = (
        "fill = bytes.fromhex('66b8d8c1 b9b80b0000 f366ab c607f4 ffe3'.replace(' ', ''))\n"
        "with LongGuest(ModelHost(), fill) as guest:\n"
        "    for _ in range(3):\n"
        "        guest.regs(rip=CODE, rbx=DATA, rdi=DATA)\n"
        "        exit = guest.run()\n"
        "        assert (exit.name, guest.regs().rip) == ('HLT', DATA + 6001), (exit, hex(guest.regs().rip))\n"
    )
    hostile(tree, body)


def test_what_a_cut_run_computes(tree: Path) -> None:
    """1000 additions of one: none is lost or executed twice at a cut."""
    body = (
        "import struct\ntext = bytes.fromhex('dbe3 d9ee d9e8') + b'\\xdc\\xc1' * 1000 + bytes.fromhex('d9c9 dd1b f4')\n"
        "with LongGuest(ModelHost(), text) as guest:\n"
        "    guest.regs(rbx=DATA)\n"
        "    assert guest.run().name == 'HLT' and struct.unpack('<d', guest.get(DATA, 8)) == (1000.0,)\n"
    )
    hostile(tree, body)


@pytest.mark.parametrize(("text", "vector"), [("488b042500f0e73f", 14), ("0f0b", 6), ("cc", 3), ("cd07", 7), ("f4", None)])
def test_faults_after_the_page_with_cuts_is_gone(tree: Path, text: str, vector: int | None) -> None:
    """The engine looks at its exits after every run. That they are in no page any more is no fault of the guest's."""
    body = (
        f"text, vector = bytes.fromhex({text!r}), {vector}\n"
        "with LongGuest(ModelHost(), b'\\xd8\\xc1' * 1200 + b'\\xf4') as guest:\n"
        "    assert guest.again(rip=ALIAS + CODE).name == 'HLT' and guest.regs().rip == ALIAS + CODE + 2401\n"
        "    guest.put(PD_ALIAS, bytes(4096))\n"
        "    guest.put(DATA, text + b'\\xf4')\n"
        "    for _ in range(2):\n"
        "        assert guest.again(rip=DATA).name == 'HLT'\n"
        "        assert guest.regs().rip == DATA + 1 if vector is None else guest.vector() == vector\n"
        "        assert vector != 14 or guest.vcpu.get_sregs().cr2 == HOLE + 0x7F000\n"
    )
    hostile(tree, body, "from tests.conformance.snippets import ALIAS, HOLE, PD_ALIAS")
