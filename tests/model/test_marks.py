"""The table of marked addresses, as the engine itself looks it up (kvmapi/model/cpu/marks.py)."""

from __future__ import annotations

import ctypes
import mmap
import random
import struct

import pytest

from kvmapi.model.cpu import layout, marks
from kvmapi.model.cpu.marks import EXIT, NONE, STOP, WATCH, Marks
from kvmapi.model.cpu.native import Native

PAGE = 4096
AT = 0x7000
INCREMENTS = b"\xff\xc1" * 100 + b"\xf4"  # inc ecx ...; hlt


class Engine:
    """An engine with a page of `inc ecx` at AT, and marks."""

    def __init__(self) -> None:
        layout.calibrate()
        self.native = Native()
        self.memory = mmap.mmap(-1, PAGE)
        self.memory[: len(INCREMENTS)] = INCREMENTS
        self.native.map(AT, PAGE, ctypes.addressof(ctypes.c_char.from_buffer(self.memory)))
        self.flag = (ctypes.c_uint32 * 1)()
        self.marks = Marks(self.native, self.flag)

    def run(self, rip: int = AT) -> int:
        """How many instructions were executed."""
        struct.pack_into("<Q", self.native.state, layout.REGS + 8, 0)
        self.native.start(rip)
        return int(struct.unpack_from("<Q", self.native.state, layout.REGS + 8)[0])


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_what_each_mark_does(engine: Engine) -> None:
    assert engine.run() == 100
    engine.marks.put(AT, {AT + 20: WATCH, AT + 40: STOP, AT + 60: EXIT})
    engine.native.flush_code()
    assert engine.run() == 20, "a watch that nobody waits for is none"
    assert engine.run(AT + 42) == 9, "an exit"
    assert engine.run(AT + 60) == 0, "and it stays one, wherever the engine comes from"
    engine.flag[0] = 1
    assert engine.run() == 10
    engine.marks.clear()
    engine.native.flush_code()
    assert engine.run() == 100 and engine.marks.at(AT + 20) == NONE


def test_the_greater_mark_counts(engine: Engine) -> None:
    for kind in (STOP, EXIT, WATCH):
        engine.marks.put(AT, {AT + 8: kind})
    assert engine.marks.at(AT + 8) == EXIT and engine.marks.at(AT + 9) == NONE
    assert engine.run() == 4


def test_pages_that_share_a_bucket_and_a_full_table(engine: Engine) -> None:
    """The engine finds its page among as many as there may be, and each page keeps its own marks."""
    generator = random.Random(7)
    pages = {generator.randrange(1 << 35, 1 << 36) for _ in range(marks.MAX_PAGES)}
    for page in list(pages)[: marks.MAX_PAGES - 1]:
        engine.marks.put(page * PAGE, {page * PAGE + page % PAGE: STOP})
    assert not engine.marks.full
    engine.marks.put(AT, {AT + 30: STOP})
    assert engine.marks.full and engine.run() == 15
    for page in list(pages)[: marks.MAX_PAGES - 1]:
        assert engine.marks.at(page * PAGE + page % PAGE) == STOP and engine.marks.at(page * PAGE + (page + 1) % PAGE) == NONE


def test_an_engine_is_closed_with_its_list_as_it_was(engine: Engine) -> None:
    engine.marks.put(AT, {AT + 2: STOP})
    engine.run()
    engine.marks.release()
    engine.native.close()
    assert Engine().run() == 100
