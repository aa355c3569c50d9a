"""What a program under `sevmm exec` can learn about the process that answers it: nothing that the model knows."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.exec.launching import Under

pytestmark = pytest.mark.model

LOOK = """
import os, sys
up = os.getppid()
assert b"vmm.cli" in open(f"/proc/{up}/cmdline", "rb").read(), "not the supervisor"
os.open("/dev/kvm", os.O_RDWR)  # it has loaded the model by now
for what in ("mem", "maps", "environ", "auxv", "map_files"):
    try:
        path = f"/proc/{up}/{what}"
        os.listdir(path) if what == "map_files" else open(path, "rb").read(1)
        print(what, "opens")
    except PermissionError:
        print(what, "refused")
"""


def test_a_program_cannot_look_into_its_supervisor(anyone: Any) -> None:
    """Both are the same user's."""
    done = Under("exec", before=anyone).run(sys.executable, "-c", LOOK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for what in ("mem", "maps", "environ", "auxv", "map_files") for word in (what, "refused")]
