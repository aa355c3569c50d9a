"""One snippet on the processor and on the model: how a snippet is made from a seed, run on both, compared and made smaller.

`snippet(seed, index)` is a pure function: a report names the two, and `Bench.judge` runs it again. A snippet is a few
instructions between an initial state and an INT3. Behind each instruction stands what `opcodes.effect` knows, so that
flags that nobody defines are not compared, and an instruction that would read one has a CMP before it. Of random bytes
the processor itself tells the instruction boundaries (single steps); they are cut at the first that cannot be compared.
"""

from __future__ import annotations

import ctypes
import random
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from kvmapi.host import Host
from tests.differential.images import fields_of_image, random_image
from tests.differential.opcodes import STATUS, Effect, effect
from tests.differential.ringed import CS32, CS64, GDT_LIMIT, USER_SS, Ringed
from tests.differential.templates import Pointers, instruction
from tests.differential.traced import CODE, CODE_SIZE, DATA, DATA_SIZE, DIED, FIXED, STACK, STACK_SIZE, SYSCALL, TIMEOUT, Stop, Traced

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
GROUPS = {
    "alu": 10, "shift": 10, "multiply": 6, "bit": 10, "move": 10, "flags": 6, "stack": 6, "string": 5, "segment": 3, "faults": 3,
    "sse_move": 5, "sse_integer": 6, "sse_float": 8, "mmx": 4, "x87": 6, "x87_functions": 0, "wild": 12, "bytes": 8,
}  # fmt: skip
"""Groups of templates and how often each is taken."""
_COMPARED = STATUS | 0x400  # with DF; the others are the machine's, or what Linux lets a tracer set
_PLAIN = 0x202
_ENTRY = CODE + 0x800
GDT_SELECTORS = (0, 3, 0x10, 0x1B, 0x23, USER_SS, CS64, 0x40, 0x43, 0x5B, GDT_LIMIT | 8 | 3, 0xFFFF, 0x2C, 0x07)


@dataclass(frozen=True)
class Snippet:
    """What a run begins with. `parts` are (name, bytes) of the instructions."""

    bits: int
    parts: tuple[tuple[str, bytes], ...]
    registers: tuple[int, ...]
    flags: int
    image: bytes
    fs_base: int
    gs_base: int
    data: bytes
    entry: int = _ENTRY
    whole: bool = False  # random bytes: boundaries are not known
    ended: tuple[Result, Result] | None = field(default=None, repr=False, compare=False)  # of the model and the processor, once judged

    @property
    def code(self) -> bytes:
        return b"".join(data for _, data in self.parts)

    def __str__(self) -> str:
        return f"{self.bits}-bit {'; '.join(f'{name} {data.hex()}' for name, data in self.parts)}"


@dataclass
class Result:
    """How a run ended and what it left."""

    stop: Stop
    fields: dict[str, Any] = field(default_factory=dict)


def _value(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.25:
        return rng.randrange(0, 80)
    if kind < 0.6:
        top = rng.choice((8, 16, 32, 64))
        edges = (0, 1, (1 << top) - 1, 1 << (top - 1), (1 << (top - 1)) - 1)
        return (rng.choice(edges) + rng.choice((0, 0, 1, -1))) & (1 << 64) - 1
    return rng.getrandbits(rng.choice((16, 32, 64, 64)))


def snippet(seed: int, index: int, groups: dict[str, int] | None = None, bits: int = 0) -> Snippet:
    """The snippet of these two numbers."""
    rng = random.Random(seed << 40 | index)
    bits = bits or (64 if rng.random() < 0.75 else 32)
    count = 16 if bits == 64 else 8
    registers = [_value(rng) for _ in range(count)]
    for number in rng.sample(range(count), count // 2):
        registers[number] = DATA + rng.randrange(0x100, DATA_SIZE - 0x100) // 8 * 8
    if rng.random() < 0.3:
        registers[1] = rng.randrange(0, 40)
    if rng.random() < 0.1:
        registers[rng.randrange(count)] = rng.choice(GDT_SELECTORS)
    registers[4] = STACK + 0x800 + rng.choice((0, 0, 0, 1, 4))
    if bits == 32:
        registers = [value & 0xFFFFFFFF for value in registers]
    fs_base, gs_base = (DATA + rng.randrange(0, 0x1000, 8) for _ in range(2))
    chosen = groups or GROUPS
    names = list(chosen)
    group = rng.choices(names, [chosen[name] for name in names])[0]
    about = Pointers(registers, fs_base, gs_base, bits)
    if group == "string":
        registers[6:8] = [DATA + 0x800 + rng.randrange(0, 0x1000) for _ in range(2)]
        registers[1] = rng.choice((0, 1, 2, 3, 5, 17, 64, 300)) if rng.random() < 0.9 else registers[1]
    number = 1 if group == "bytes" else rng.choice((1, 1, 1, 2, 3, 4, 5))
    others = [name for name in names if name != "bytes"] or [group]
    weights = [chosen[name] for name in others]
    parts = []
    for _ in range(number):
        parts.append(instruction(rng, group if rng.random() < 0.6 else rng.choices(others, weights)[0], about))
    flags = _PLAIN | rng.getrandbits(12) & STATUS | (0x400 if rng.random() < 0.15 else 0)
    data = bytearray(_BASE)
    at = rng.randrange(0, DATA_SIZE - 0x200)
    data[at : at + 0x100] = rng.randbytes(0x100)
    entry = CODE + CODE_SIZE - rng.randrange(1, 8) if rng.random() < 0.01 else _ENTRY
    image = random_image(rng, x87=group.startswith(("x87", "mmx")))
    return Snippet(
        bits,
        tuple(parts),
        tuple(registers),
        flags,
        image,
        fs_base,
        gs_base,
        bytes(data),
        entry,
        whole=any(name in ("bytes", "wild") for name, _ in parts),
    )


def _base() -> bytes:
    """Data that looks like numbers, selectors, floating-point values and pointers into itself."""
    rng = random.Random(99)
    words = []
    for _ in range(DATA_SIZE // 8):
        kind = rng.randrange(6)
        if kind == 0:
            words.append(
                struct.pack("<d", rng.choice((0.0, -0.0, 1.0, -1.5, 1e308, 5e-324, float("inf"), float("nan"), rng.uniform(-1e6, 1e6))))
            )
        elif kind == 1:
            words.append(
                b"".join(struct.pack("<f", rng.choice((0.0, -0.0, 1.0, 3e38, 1e-45, float("-inf"), rng.uniform(-9, 9)))) for _ in "12")
            )
        elif kind == 2:
            words.append(struct.pack("<IHH", rng.choice((_ENTRY + 0x100, DATA + 0x400)), rng.choice(GDT_SELECTORS), rng.randrange(256)))
        else:
            words.append(rng.randbytes(8) if kind < 5 else struct.pack("<Q", DATA + rng.randrange(0x200, 0x1E00)))
    return b"".join(words)


_BASE = _base()


def prepare(one: Snippet) -> tuple[Snippet, dict[int, int]]:
    """(the snippet with a CMP before who reads an undefined flag, RIP -> flags that are defined there). Parts from the
    first that cannot be compared on are dropped.
    """
    parts: list[tuple[str, bytes]] = []
    defined, at, seen, cl = _COMPARED, one.entry, {}, one.registers[1] & 0xFF if one.registers else None
    compare = ("cmp", b"\x39\xd1")
    for name, data in one.parts:
        known: Effect = effect(data, one.bits, cl)
        if known.left_out:
            break
        cl = None  # an instruction may change it
        if known.reads & ~defined & STATUS:
            parts.append(compare)
            seen[at] = defined
            at, defined = at + len(compare[1]), _COMPARED
        seen[at] = defined
        parts.append((name, data))
        at += len(data)
        defined = defined & ~known.undefined | known.defines
    seen[at] = seen[at + 1] = defined
    return replace(one, parts=tuple(parts)), seen


class Bench:
    """The traced child and the model's guest, side by side."""

    def __init__(self, host: Host) -> None:
        self.traced = Traced()
        try:
            self.guest = Ringed(host)
        except BaseException:
            self.traced.close()
            raise
        for side in (self.traced, self.guest):
            side.areas[FIXED][:] = _BASE[: len(side.areas[FIXED])]

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.traced.close()
        self.guest.__exit__()

    def judge(self, one: Snippet) -> tuple[dict[str, tuple[Any, Any]], Snippet]:
        """Names of what differs -> (model's, processor's), and the snippet as it was run. Empty where nothing could be
        compared.
        """
        if one.whole:
            one = self._cut(one)
            with_compares, _ = prepare(one)
            if with_compares.parts != one.parts:  # other flags: other ways
                one = self._cut(replace(with_compares, whole=True))
        one, defined = prepare(one)
        if not one.parts:
            return {}, one
        real = self.on_processor(one)
        if real.stop.vector in (DIED, SYSCALL) or self._is_int1(real):
            return {}, one
        made = self.on_model(one)
        one = replace(one, ended=(made, real))
        mask = defined.get(real.fields["rip"], _COMPARED & ~STATUS)
        for side in (real, made):
            side.fields["rflags"] &= mask
        if TIMEOUT in (real.stop.vector, made.stop.vector):
            same = real.stop.vector == made.stop.vector
            return ({} if same else {"vector": (made.stop.vector, real.stop.vector)}), one
        return {name: (made.fields[name], value) for name, value in real.fields.items() if made.fields[name] != value}, one

    def _is_int1(self, real: Result) -> bool:
        """Was that INT1, behind a jump that was taken when the bytes were cut?"""
        at = real.fields["rip"] - 1 - CODE
        return real.stop.vector == 3 and 0 <= at < CODE_SIZE and self.traced.areas[CODE][at] == 0xF1

    def _cut(self, one: Snippet) -> Snippet:
        """Random bytes as instructions, as far as the processor executes them and they can be compared."""
        self._load(self.traced.areas, one, one.code)
        self._set(one)
        code, parts = one.code + b"\xcc", []
        names, where = {}, 0
        for name, data in one.parts:
            names[where], where = name, where + len(data)
        rips = self.traced.steps(24)
        expected = one.entry
        for rip, after in zip(rips, [*rips[1:], -1]):
            at = rip - one.entry
            if rip != expected or not 0 <= at < len(one.code):
                break
            plain = 0 < after - rip <= 15 and after - one.entry <= len(one.code)
            length = after - rip if plain else len(one.code) - at
            if effect(code[at:], one.bits).left_out:
                break
            parts.append((names.get(at, "bytes") if plain else "bytes", code[at : at + length]))
            expected = rip + length
        return replace(one, parts=tuple(parts), whole=False)

    # ---- the processor
    def _load(self, areas: dict[int, memoryview], one: Snippet, code: bytes) -> None:
        area = areas[CODE]
        area[:] = _FILL
        at = one.entry - CODE
        part = code[: CODE_SIZE - at]
        area[at : at + len(part)] = part
        areas[DATA][:] = one.data
        areas[STACK][:] = _STACK

    def _set(self, one: Snippet) -> None:
        regs = self.traced.regs
        values = one.registers if one.bits == 64 else (*one.registers, *([0] * 8))
        for name, value in zip(NAMES, values):
            setattr(regs, name, value)
        regs.rip, regs.eflags = one.entry, one.flags
        regs.cs, regs.ss = CS64 if one.bits == 64 else CS32, USER_SS
        regs.ds = regs.es = USER_SS
        regs.fs = regs.gs = 0
        regs.fs_base, regs.gs_base = one.fs_base, one.gs_base
        ctypes.memmove(self.traced.fpu, one.image, 512)

    def on_processor(self, one: Snippet) -> Result:
        """Run it in the child."""
        traced = self.traced
        self._load(traced.areas, one, one.code)
        self._set(one)
        stop = traced.run()
        regs = traced.regs
        fields = {name: getattr(regs, name) for name in NAMES}
        fields |= {name: getattr(regs, name) for name in ("rip", "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base")}
        return self._result(stop, regs.eflags, fields, traced.fpu.raw, traced.areas, one)

    # ---- the model
    def on_model(self, one: Snippet) -> Result:
        """Run it in the guest."""
        guest = self.guest
        self._load(guest.areas, one, one.code)
        values = one.registers if one.bits == 64 else (*one.registers, *([0] * 8))
        for name, value in zip(NAMES, values):
            setattr(guest.now, name, value)
        guest.code32, guest.fs_base, guest.gs_base = one.bits == 32, one.fs_base, one.gs_base
        stop = Stop(*guest.run_snippet(one.entry, one.registers[4], one.flags, one.image))
        left = guest.left
        fields = {name: getattr(guest.now, name) for name in (*NAMES, "rip")}
        fields |= {name: getattr(left, name).selector for name in ("ds", "es", "fs", "gs")}
        fields |= {"cs": guest.cs, "ss": guest.ss, "fs_base": left.fs.base, "gs_base": left.gs.base}
        return self._result(stop, guest.now.rflags, fields, guest.image(), guest.areas, one)

    def _result(self, stop: Stop, flags: int, fields: dict[str, Any], image: bytes, areas: dict[int, memoryview], one: Snippet) -> Result:
        error = stop.error & 0xFFFF if stop.vector != 14 or stop.cr2 < 1 << 47 else stop.error & ~1  # Linux hides its own pages
        fields |= {"vector": stop.vector, "rflags": flags, "error": error, "cr2": stop.cr2 if stop.vector == 14 else 0}
        fields |= fields_of_image(image)
        fields |= {"data": bytes(areas[DATA]), "stack": bytes(areas[STACK])}
        if one.bits == 32:
            for name in NAMES[8:]:
                del fields[name]
        return Result(stop, fields)

    # ---- smaller
    def smaller(self, one: Snippet) -> tuple[dict[str, tuple[Any, Any]], Snippet]:
        """The shortest run of parts that still differs in something of what differs."""
        found, ran = self.judge(one)
        names = set(found)
        again = True
        while again and len(ran.parts) > 1:
            again = False
            for number in range(len(ran.parts)):
                rest = ran.parts[:number] + ran.parts[number + 1 :]
                fewer = replace(ran, parts=rest, whole=any(name in ("bytes", "wild") for name, _ in rest))
                differing, rerun = self.judge(fewer)
                if names & set(differing) and len(rerun.parts) < len(ran.parts):
                    found, ran, again = differing, rerun, True
                    break
        return found, ran


_FILL = b"\xcc" * CODE_SIZE
_STACK = bytes((n * 7) & 0xFF for n in range(STACK_SIZE))
