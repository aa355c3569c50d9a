"""JSON, JUnit, and what the table is made of."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from vmm.selftests import report
from vmm.selftests.execute import Result
from vmm.selftests.subtests import Part

RESULTS = [
    Result("s", "a", "plain", "mainline", "pass", "", "kernel", "it can", 0.25),
    Result(
        "s", "a", "sev", "mainline", "fail", "no\x1b[2J\x00\ud800 <&> \u2028", "model", "asked for", 0.5, parts=[Part("p", "fail", "w\x00")]
    ),
    Result("t", "b", "sev", "upm-v6", "skip", "no moon"),
    Result("t", "c", "plain", "mainline", "skip", "no moon"),
]


def test_json_has_everything() -> None:
    data = json.loads(json.dumps(report.to_json(RESULTS, "auto", 1.5)))
    assert (data["version"], data["on"], data["elapsed_s"], data["totals"]) == (1, "auto", 1.5, {"pass": 1, "fail": 1, "skip": 2})
    assert set(data["tests"][0]) == {
        "suite", "test", "type", "dialect", "result", "text", "rung", "rung_reason", "elapsed_s", "timed_out", "notes", "subtests",
    }  # fmt: skip
    assert data["tests"][1]["subtests"] == [{"name": "p", "result": "fail", "text": "w\0"}]


def test_junit_can_be_read_and_says_the_same() -> None:
    root = ElementTree.fromstring(report.to_junit(RESULTS, 1.5))
    assert {key: root.get(key) for key in ("tests", "failures", "skipped", "errors")} == {
        "tests": "4", "failures": "1", "skipped": "2", "errors": "0",
    }  # fmt: skip
    assert [(suite.get("name"), len(suite)) for suite in root] == [("s", 2), ("t", 2)]
    first, second = root[0]
    assert (first.get("name"), first.get("classname"), first.get("time")) == ("a[plain]", "kernel.s", "0.250")
    failure = second.find("failure")
    assert failure is not None and failure.text is not None and failure.text.startswith("no\\x1b[2J\\x00\\xd800 <&>")
    assert "fail p: w\\x00" in (second.findtext("system-out") or "")
    skipped = root[1][0].find("skipped")
    assert skipped is not None and skipped.get("message") == "no moon"


def test_columns_are_the_rungs_and_cases_that_occur() -> None:
    assert report.columns(RESULTS) == [("kernel", "plain"), ("model", "sev"), ("", "sev-upm-v6")]
    rows = [(suite, test, {column: cell.result for column, cell in cells.items()}) for suite, test, cells in report.rows(RESULTS)]
    assert rows == [
        ("s", "a", {("kernel", "plain"): "pass", ("model", "sev"): "fail"}),
        ("t", "b", {("", "sev-upm-v6"): "skip"}),
        ("t", "c", {("kernel", "plain"): "skip"}),
    ]
