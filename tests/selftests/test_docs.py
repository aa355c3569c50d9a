"""What docs/selftests.md shows works as it stands there, and names what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vmm.selftests import api
from vmm.selftests.bench import Bench
from vmm.selftests.case import Case, combinations, declared
from vmm.selftests.fixtures import NAMES, Fixtures


@pytest.fixture
def page(tree: Path) -> str:
    return (tree / "docs" / "selftests.md").read_text()


@pytest.mark.model
@pytest.mark.gcc
def test_the_example_passes_on_every_type_it_names_and_has_twenty_lines(page: str) -> None:
    text = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(compile(text, "docs/selftests.md", "exec"), names)
    test = names["test_shared_word"]
    runs = list(combinations(declared(test)))
    assert len(runs) == 4
    for type, dialect in runs:
        with Fixtures(Case(type, dialect, "model")) as fixtures:
            test(fixtures.machine)
    body = [line for line in text[text.index("GUEST =") :].splitlines() if line.strip()]
    assert len(body) <= 23


def test_every_fixture_and_every_method_is_in_the_page(page: str) -> None:
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert set(NAMES) <= table
    public = {name for name in vars(Bench) if not name.startswith("_") and name not in ("close", "expire")}
    missing = {name for name in public if not re.search(rf"`?(with )?m\.{name}\b", page)}
    assert missing == set()


def test_what_the_page_imports_is_there(page: str) -> None:
    for line in re.findall(r"from vmm\.selftests\.api import (.*)", page):
        assert set(re.split(r",\s*", line.strip())) <= {*api.__all__, "..."}
