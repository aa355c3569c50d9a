"""The table of `sevmm selftest`: never wider than its room, and every result in exactly one cell."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cli import selftest_table
from vmm.selftests.execute import Result
from vmm.selftests.subtests import FAIL, PASS, SKIP

CASES = [("plain", "mainline"), ("sev", "mainline"), ("sev-es", "upm-v6"), ("sw-protected", "attr-v11"), ("plain", "upm-v7")]


def result(suite: str, test: str, case: tuple[str, str] = CASES[0], verdict: str = PASS, rung: str = "model") -> Result:
    made = Result(suite, test, *case, verdict)
    made.rung = rung
    return made


def table(results: list[Result], width: int) -> list[str]:
    return list(selftest_table.lines(results, width, lambda text, _: text))


SOME = [
    result(suite, test, case) for suite in ("a_suite", "b") for test in ("one", "another") for case in CASES[: 3 if suite == "b" else 2]
]


def test_one_table_where_it_fits() -> None:
    assert table(SOME, 80) == [
        "           model  model  model",
        "           plain  sev    sev-es-upm-v6",
        "a_suite",
        "  one      ok     ok",
        "  another  ok     ok",
        "b",
        "  one      ok     ok     ok",
        "  another  ok     ok     ok",
    ]


def test_a_table_per_suite_where_not() -> None:
    assert table(SOME, 32) == [
        "           model  model",
        "a_suite    plain  sev",
        "  one      ok     ok",
        "  another  ok     ok",
        "",
        "           model  model",
        "b          plain  sev",
        "  one      ok     ok",
        "  another  ok     ok",
        "",
        "           model",
        "b          sev-es-upm-v6",
        "  one      ok",
        "  another  ok",
    ]


RESULTS = st.lists(
    st.builds(
        result, st.sampled_from(["s", "a_longer_suite"]), st.sampled_from(["t", "some_test", "w" * 30]), st.sampled_from(CASES),
        st.sampled_from([PASS, FAIL, SKIP]), st.sampled_from(["model", "kernel", ""]),
    ), min_size=1, max_size=30, unique_by=lambda made: (made.suite, made.test, made.type, made.dialect),
)  # fmt: skip


@given(RESULTS, st.integers(20, 160))
def test_nothing_is_left_out_and_nothing_is_too_wide(results: list[Result], width: int) -> None:
    lines = table(results, width)
    words = Counter(word for line in lines if line.startswith("  ") for word in line.split()[1:] if word in ("ok", "FAIL", "skip"))
    wanted = Counter({PASS: "ok", FAIL: "FAIL", SKIP: "skip"}[made.result] for made in results)
    assert words == wanted
    names = max(max(len(made.test) + 2, len(made.suite)) for made in results)
    assert max(map(len, lines)) <= max(width, names + 2 + len("sw-protected-attr-v11"))
    assert all(line == line.rstrip() for line in lines)


def test_room_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    for text, room in (("90", 90), ("", 120), ("wide", 120), ("3", 120)):
        monkeypatch.setenv("COLUMNS", text)
        assert selftest_table.room(io.StringIO()) == room


def test_colours_take_no_room() -> None:
    painted = list(selftest_table.lines(SOME, 80, lambda text, colour: f"<{colour}>{text}</>"))
    assert painted[0] == "         <dim>  model  model  model</>"
    assert painted[3] == "  one      <green>ok   </>  <green>ok   </>"
