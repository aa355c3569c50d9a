"""What the tests of scripts/lab share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def lab(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lablib can be imported, and has an empty cache; gives the cache."""
    monkeypatch.syspath_prepend(str(tree / "scripts"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sevmm" / "lab"


def resolved(version: str = "7.3.4-1") -> dict[str, Any]:
    """What the mirror answered."""
    return {"package": "linux-source-7.3", "version": version, "suites": []}
