"""The decoder of plain MOVs: length, size, register and direction. tests/conformance executes them at MMIO addresses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi.model.cpu import moves
from kvmapi.model.cpu.moves import Move


@pytest.mark.parametrize(("text", "bits", "move"), [
    ("8903", 64, Move(2, 4, True, 0)),                              # mov [rbx], eax
    ("488b4310", 64, Move(4, 8, False, 0)),                         # mov rax, [rbx+0x10]
    ("44894c2408", 64, Move(5, 4, True, 9)),                        # mov [rsp+8], r9d
    ("8825000000d0", 64, Move(6, 1, True, 0, high=True)),           # mov [rip-0x30000000], ah
    ("408835000000d0", 64, Move(7, 1, True, 6)),                    # mov [rip-0x30000000], sil
    ("66c7030102", 64, Move(5, 2, True, 0, immediate=0x201)),       # mov word [rbx], 0x201
    ("48c703ffffffff", 64, Move(7, 8, True, 0, immediate=2**64 - 1)),  # mov qword [rbx], -1
    ("67c6 45fd80", 64, Move(5, 1, True, 0, immediate=0x80)),       # mov byte [ebp-3], 0x80
    ("a3b000e0fe", 32, Move(5, 4, True, 0)),                        # mov [0xfee000b0], eax
    ("48a1b000e0fe00000000", 64, Move(10, 8, False, 0)),            # mov rax, [0xfee000b0]
    ("8b1e3412", 16, Move(4, 2, False, 3)),                         # mov bx, [0x1234]
    ("668b4602", 16, Move(4, 4, False, 0)),                         # mov eax, [bp+2]
    ("67 8b1488", 16, Move(4, 2, False, 2)),                        # mov dx, [eax+ecx*4]
    ("8b0c25000000d0", 64, Move(7, 4, False, 1)),                   # mov ecx, [0xffffffffd0000000]
])  # fmt: skip
def test_what_is_decoded(text: str, bits: int, move: Move) -> None:
    code = bytes.fromhex(text)
    assert moves.decode(code, bits) == move
    assert moves.decode(code + b"\x90" * 5, bits) == move, "what follows does not matter"
    assert moves.decode(code[:-1], bits) is None, "cut off"


@pytest.mark.parametrize("text", ["89c3", "0103", "0f1003", "f08903", "f3a4", "c70b00000000", "8e03", "", "48", "66" * 15])
def test_what_is_not_a_plain_move(text: str) -> None:
    assert moves.decode(bytes.fromhex(text), 64) is None


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=20), st.sampled_from([16, 32, 64]))
def test_any_bytes(code: bytes, bits: int) -> None:
    move = moves.decode(code, bits)
    if move is not None:
        assert 0 < move.length <= min(15, len(code)) and move.size in (1, 2, 4, 8) and 0 <= move.register <= 15
        assert move.immediate is None or 0 <= move.immediate < 1 << 8 * move.size
        assert move.size < 8 or bits == 64
