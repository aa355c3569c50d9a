"""Where the engine must end a block, lest its translator run out of temporaries and take the process with it.

A temporary is a slot for an intermediate value in the translator; what is used and not given back *leaks*.

Unicorn 2.1.4 translates up to 512 instructions as one block, with room for 512 temporaries, of which about 50 are
always in use. Some instructions take one or two for a constant and do not give them back before the block ends: x87,
SSE with an immediate, loads of segment registers and a few more. Nobody checks: some 230 x87 instructions in a row,
which any guest can write and no compiler does, overwrite the engine's memory.

So some addresses are *cuts*: exits of the engine, at which it ends the block and stops; the model executes the one
instruction there alone and goes on. What is kept true:

- a block leaks at most `LIMIT` temporaries, wherever it starts: also in the middle of what somebody else would call an
  instruction;
- blocks cross into the next page, but not through that (they end after 4064 bytes). The part of such a block in
  either page leaks at most `SHARE`, so that each page can be judged alone, whatever the other one becomes.
  Instructions may reach into a page by 14 bytes, so that a block may come in at any of the first 15;
- no cut is at the first byte of a page, as the engine looks at the byte before each exit;
- ordinary pages have no cuts, as each costs a stop.

Three stages, each for what the one before does not clear: `count` the bytes that could be leaking instructions (in
nearly every page of ordinary code all together stay below SHARE); follow the chains at the two ends of the page,
which is enough up to LIMIT; follow all. A chain is what executing straight on from some offset would execute, by the
lengths that lengths.py tells. It ends at a jump, call or return, and where the engine refuses an instruction; where
that is in doubt, it goes on.
"""

from __future__ import annotations

import re

from kvmapi.model.cpu.lengths import ENDS, LEAKS, LEAKS_0F, MAX_LENGTH, PREFIX, SLOW, WIDTHS, Width

LIMIT = 420  # temporaries: 512 without 36 registers, some 20 in use for a moment, and 3 for what ends a block; with room to spare
SHARE = LIMIT // 2
_ROOM = 2 * MAX_LENGTH  # that `Width.decode` may look ahead

_X87 = bytes(range(0xD8, 0xE0))
_SINGLE = {bits: bytes(opcodes) for bits, opcodes in LEAKS.items()}
_PAIRS = [bytes((0x0F, second)) for second in (*LEAKS_0F, 0x78, 0x3A)]  # 0F 78 leaks two
_AFTER_VEX = b"[" + re.escape(bytes(LEAKS_0F))
_MORE = [
    (1, re.compile(rb"[\xd8-\xdf][\xc0-\xff]")),  # between registers: one more
    (1, re.compile(rb"\x0f\x38[\xf0\xf1]")),
    (2, re.compile(rb"\xc5(?=[\0-\xff]" + _AFTER_VEX + rb"\x3a])")),
    (2, re.compile(rb"\xc4(?=[\0-\xff]{2}" + _AFTER_VEX + rb"\x3a\xf0\xf1]|[\x03\x23\x43\x63\x83\xa3\xc3\xe3])")),
]


def count(code: bytes | bytearray) -> dict[int, int]:
    """By width: at most so many temporaries do all instructions in `code` leak together, wherever they start."""
    size = len(code)
    common = size - len(code.translate(None, _X87))
    common += sum(code.count(pair) for pair in _PAIRS) + sum(weight * len(pattern.findall(code)) for weight, pattern in _MORE)
    return {bits: common + size - len(code.translate(None, single)) for bits, single in _SINGLE.items()}


def cuts(code: bytes | bytearray, usable: int, bits: int, bound: int | None = None) -> set[int]:
    """Offsets in [1, usable) at which a block must end, in code of this width. `code` is a page and up to 14 bytes of
    the next one; `bound` is what `count` says of it, if that is known already.
    """
    if bound is None:
        bound = count(code)[bits]
    if bound <= SHARE:
        return set()
    padded = bytearray(len(code) + _ROOM)  # wiped below: it may be an encrypted guest's plaintext
    with memoryview(padded) as target:
        target[: len(code)] = code
    width = WIDTHS[bits]
    found = _leaving(padded, usable, width, whole=bound > LIMIT)
    _entering(padded, usable, width, found)
    padded[:] = bytes(len(padded))
    return found


def _leaving(code: bytearray, usable: int, width: Width, *, whole: bool) -> set[int]:
    """Cut what would leak more than LIMIT, where all beyond `usable` counts as SHARE. Goes backwards through the
    page; unless `whole`, only until no chain from further up can leave the page.
    """
    quick, decode = width.quick, width.decode
    leaks = [0] * usable + [SHARE] * (MAX_LENGTH + 1)  # of the chain from here, were it no cut
    leaves = [False] * usable + [True] * (MAX_LENGTH + 1)
    found: set[int] = set()
    inside = 0  # so many chains in a row have stayed in the page
    for at in range(usable - 1, -1, -1):
        size = quick[code[at]]
        leak = 0
        if size == SLOW or (size == PREFIX and at == usable - 1):
            size, leak = decode(code, at)
        if size == PREFIX:  # of what follows: also of a cut, which is none for who begins here
            leaks[at], leaves[at] = leaks[at + 1], leaves[at + 1]
        elif 0 < size < ENDS and at + size not in found:
            after = at + size
            if leaks[after] + leak > LIMIT:
                found.add(after)
                leaks[at] = leak
            else:
                leaks[at], leaves[at] = leaks[after] + leak, leaves[after]
        else:
            leaks[at] = leak
        inside = 0 if leaves[at] else inside + 1
        if inside > MAX_LENGTH and not whole:
            break
    return found


def _entering(code: bytearray, usable: int, width: Width, found: set[int]) -> None:
    """Cut what comes in from the page before and would leak more than SHARE."""
    for start in range(MAX_LENGTH):
        at = start
        total = 0
        while at < usable and at not in found:
            size, leak = width.decode(code, at)
            if not size:
                break
            total += leak
            if total > SHARE:
                found.add(at)
                break
            at += size
