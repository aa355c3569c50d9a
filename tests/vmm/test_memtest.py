"""A guest nobody here wrote: Debian's memtest86+ starts on the serial console and tests guest memory.

Its tests run in order, so when the screen names a later one, those before it are over; the errors it counted are on the same screen.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE
from vmm.image import LINUX32, LINUX64, load
from vmm.run import GuestRequest, run_guest

FOLDERS = [Path(folder) for folder in (os.environ.get("SEVMM_MEMTEST", ""), "/boot") if folder]
IMAGES = {"memtest86+x64.bin": LINUX64, "memtest86+ia32.bin": LINUX32}
LATER_TEST, ERRORS = re.compile(rb"#([1-9]|10) +\["), re.compile(rb"Errors: +(\d+)")
FWAIT = "instruction 9b db e3"


class Enough(Exception):
    """A later test has begun: the run may end."""


class Screen:
    """What memtest86+ sends, and an exception when it has shown enough."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data
        later = LATER_TEST.search(self.data)
        if later is not None and ERRORS.search(self.data, later.end()) is not None:
            raise Enough


def find(name: str) -> str:
    for folder in FOLDERS:
        if (folder / name).exists():
            return str(folder / name)
    pytest.skip(f"needs {name}; get it: apt-get install memtest86+ (or SEVMM_MEMTEST=the folder that holds it)")


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_memtest86_passes_a_test_over_guest_memory(any_host: Any, name: str) -> None:
    path = find(name)
    assert load(path).protocol == IMAGES[name]
    screen = Screen()
    request = GuestRequest(path, host=any_host, memory=16 << 20, arguments="console=ttyS0,115200", timeout=120 * PATIENCE, console=screen)
    try:
        report = run_guest(request)
    except Enough:
        pass
    else:
        if any_host.name == "kernel" and FWAIT in report.message:
            pytest.skip(f"this KVM does not emulate FWAIT, memtest86+'s first x87 instruction: {report.message}; get it: SVM or VMX")
        pytest.fail(f"{report.result}: {report.message}\n{report.console[-2000:]}")
    assert b"Memtest86+ v" in screen.data
    assert re.search(rb"#0 +\[Address test", screen.data) or LATER_TEST.search(screen.data)
    assert {int(count) for count in ERRORS.findall(screen.data)} == {0}
