"""The rows of templates.py for SSE, MMX and x87, by group, in the form of rows.py.

Opcodes are AMD64 Architecture Programmer's Manual, volumes 4 and 5.
"""

from __future__ import annotations

from tests.differential.rows import lines


def _sse(opcodes: str, prefixes: str, form: str = "/r -", escape: str = "0f") -> list[str]:
    """A row for each of these opcodes with each of these prefixes; `none` is no prefix."""
    found = []
    for opcode in opcodes.split():
        for prefix in prefixes.split():
            code = f"{prefix}_{escape}{opcode}" if prefix != "none" else f"{escape}{opcode}"
            found.append(f"{'' if prefix == 'none' else prefix + ':'}{escape}{opcode} {code} {form}")
    return found


ROWS: dict[str, str] = {
    "sse_move": lines(
        *_sse("10 11", "none 66 f3 f2"),
        *_sse("12 16", "none 66"),
        *_sse("13 17", "none 66", "/r m -"),
        *_sse("12", "f3 f2"),
        *_sse("16", "f3"),
        *_sse("14 15", "none 66", "/r a16 -"),
        *_sse("28 29", "none 66", "/r a16 -"),
        *_sse("2b e7", "66", "/r m a16 -"),
        *_sse("2b", "none", "/r m a16 -"),
        *_sse("6f 7f", "f3"),
        *_sse("6f 7f", "66", "/r a16 -"),
        *_sse("6e 7e", "66", "/r DQ"),
        *_sse("7e", "f3"),
        *_sse("d6", "66"),
        *_sse("50", "none 66", "/r x DQ"),
        *_sse("d7", "66", "/r x D"),
        *_sse("c4", "66", "/r ib -"),
        *_sse("c5", "66", "/r ib x D"),
        *_sse("c6", "none 66", "/r ib a16 -"),
        *_sse("70", "66", "/r ib a16 -"),
        *_sse("70", "f3 f2", "/r ib a16 -"),
        *_sse("f0", "f2", "/r m -"),
        *_sse("f7", "66", "/r x -"),
        *_sse("2a", "66", "/r m a16 -", "0f38"),
        "ldmxcsr 0fae /2 m -",
        "stmxcsr 0fae /3 m -",
        "mfence 0fae /6 x -",
        "sfence 0fae /7 x -",
        "lfence 0fae /5 x -",
    ),
    "sse_integer": lines(
        *_sse(
            "60 61 62 63 64 65 66 67 68 69 6a 6b 6c 6d 74 75 76 d1 d2 d3 d4 d5 d8 d9 da db dc dd de df e0 e1 e2 e3 e4 e5 e8 e9 ea "
            "eb ec ed ee ef "
            "f1 f2 f3 f4 f5 f6 f8 f9 fa fb fc fd fe",
            "66",
            "/r a16 -",
        ),
        *(
            f"{name} 66_0f{op} /{n} ib x -"
            for name, op, n in (
                ("psrlw", 71, 2),
                ("psraw", 71, 4),
                ("psllw", 71, 6),
                ("psrld", 72, 2),
                ("psrad", 72, 4),
                ("pslld", 72, 6),
                ("psrlq", 73, 2),
                ("psrldq", 73, 3),
                ("psllq", 73, 6),
                ("pslldq", 73, 7),
            )
        ),
        *_sse(
            "00 01 02 03 04 05 06 07 08 09 0a 0b 10 14 15 17 1c 1d 1e 28 29 2b 37 38 39 3a 3b 3c 3d 3e 3f 40 41", "66", "/r a16 -", "0f38"
        ),
        *_sse("20 21 22 23 24 25 30 31 32 33 34 35", "66", "/r -", "0f38"),
        *_sse("db dc dd de df", "66", "/r a16 -", "0f38"),
        *_sse("0e 0f 42 44 60 61 62 63 df", "66", "/r ib a16 -", "0f3a"),
        *_sse("14 15 20", "66", "/r ib -", "0f3a"),
        *_sse("16 22", "66", "/r ib DQ", "0f3a"),
    ),
    "sse_float": lines(
        *_sse("51 58 59 5c 5d 5e 5f", "none 66", "/r a16 -"),
        *_sse("51 58 59 5c 5d 5e 5f", "f3 f2"),
        *_sse("52 53", "none", "/r a16 -"),
        *_sse("54 55 56 57", "none 66", "/r a16 -"),
        *_sse("2e 2f", "none 66"),
        *_sse("c2", "none 66", "/r ib a16 -"),
        *_sse("c2", "f3 f2", "/r ib -"),
        *_sse("5a", "none f3 f2"),
        *_sse("5a", "66", "/r a16 -"),
        *_sse("5b", "none 66 f3", "/r a16 -"),
        *_sse("e6", "f3"),
        *_sse("e6", "66 f2", "/r a16 -"),
        *_sse("2a 2c 2d", "f3 f2", "/r DQ"),
        *_sse("7c 7d d0", "66 f2", "/r a16 -"),
        *_sse("08 09 0c 0d 40 41", "66", "/r ib a16 -", "0f3a"),
        *_sse("0a 0b 17 21", "66", "/r ib -", "0f3a"),
    ),
    "mmx": lines(
        *_sse(
            "60 61 62 63 64 65 66 67 68 69 6a 6b 6f 7f 74 75 76 d1 d2 d3 d4 d5 d8 d9 da db dc dd de df e0 e1 e2 e3 e4 e5 e8 e9 ea "
            "eb ec ed ee ef "
            "f1 f2 f3 f4 f5 f6 f8 f9 fa fb fc fd fe",
            "none",
        ),
        *_sse("6e 7e", "none", "/r DQ"),
        *_sse("c4 70", "none", "/r ib -"),
        *_sse("00 01 02 03 04 05 06 07 08 09 0a 0b 1c 1d 1e", "none", "/r -", "0f38"),
        *_sse("0f", "none", "/r ib -", "0f3a"),
        *_sse("2a 2c 2d", "none 66", "/r -"),
        "emms 0f77 -",
        *_sse("d6", "f3 f2", "/r x -"),
        *_sse("e7", "none", "/r m -"),
        *_sse("f7", "none", "/r x -"),
        *_sse("d7", "none", "/r x D"),
        *_sse("c5", "none", "/r x ib D"),
    ),
    "x87": lines(
        *(f"d8/{n} d8 /{n} -" for n in range(8)),
        *(f"dc/{n} dc /{n} -" for n in range(8)),
        *(f"da/{n} da /{n} m -" for n in range(8)),
        *(f"de/{n} de /{n} -" for n in range(8) if n != 3),
        *(f"d9/{n} d9 /{n} m -" for n in (0, 2, 3, 5, 7)),
        *(f"db/{n} db /{n} m -" for n in (0, 1, 2, 3, 5, 7)),
        *(f"dd/{n} dd /{n} m -" for n in (0, 1, 2, 3, 7)),
        *(f"df/{n} df /{n} m -" for n in (0, 1, 2, 3, 4, 5, 6, 7)),
        *(f"d9/{n} d9 /{n} x -" for n in (0, 1)),
        *(f"da/{n} da /{n} x -" for n in range(4)),
        *(f"db/{n} db /{n} x -" for n in (0, 1, 2, 3, 5, 6)),
        *(f"dd/{n} dd /{n} x -" for n in (0, 2, 3, 4, 5)),
        "df/5 df /5 x -",
        "df/6 df /6 x -",
        *(
            f"d9{code} d9{code} -"
            for code in ("e0", "e1", "e4", "e5", "e8", "e9", "ea", "eb", "ec", "ed", "ee", "f4", "f6", "f7", "fa", "fc", "fd", "d0")
        ),
        "fcompp ded9 -",
        "fucompp dae9 -",
        "fnclex dbe2 -",
        "fninit dbe3 -",
        "fnstsw dfe0 -",
        "fwait 9b -",
        "fnstenv d9 /6 m -",
        "fldenv d9 /4 m -",
        "fnsave dd /6 m -",
    ),
    "x87_functions": lines(*(f"d9{code} d9{code} -" for code in ("f0", "f1", "f2", "f3", "f5", "f8", "f9", "fb", "fe", "ff"))),
}
"""Lines by group."""
