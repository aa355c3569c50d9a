"""Runs a case of the RFC suite on what a test runs on: builds the guest, the machine for each size of shared pages, and lets both play."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vmm.config import MachineConfig
from vmm.selftests.fixtures import load_guest
from vmm.selftests.privmem.beyond import BEYOND
from vmm.selftests.privmem.cases import SCENARIOS, Scenario
from vmm.selftests.privmem.guest import program
from vmm.selftests.privmem.rig import REGION, Rig
from vmm.selftests.privmem.shared import PAGE_2M, PAGE_4K

if TYPE_CHECKING:
    from kvmapi.host import Host
    from vmm.selftests.case import Case
    from vmm.selftests.subtests import Subtest

MEMORY = 16 << 20


@cache
def guest_text(by_hlt: bool) -> str:
    """The C text of the guest with all cases; its complaints name the file and line where the case stands."""
    bodies = []
    for scenario in (*SCENARIOS, *BEYOND):
        file = Path(inspect.getfile(scenario.host))
        source = file.read_text()
        bodies.append((scenario.guest, source.count("\n", 0, source.index(f'r"""{scenario.guest}')) + 1, file.name))
    return program(bodies, by_hlt)


def make_rig(scenario: Scenario, case: Case, host: Host, page: int = PAGE_4K, upm: bool = False) -> Rig:
    """A machine that has been launched with the guest of `scenario`, ready to run."""
    sev = case.type.startswith("sev")
    words = [f"case={scenario.number}"]
    if sev:
        words.append(f"size={PAGE_2M if page == PAGE_2M else 2 * PAGE_4K}")
    if upm or case.dialect == REGION:
        words.append("unmark=range")
    if upm:
        words.append("upm")
    image = load_guest(guest_text(by_hlt=sev))
    config = MachineConfig(image, host, case.type, MEMORY, arguments=" ".join(words).encode(), dialect=case.dialect)
    return Rig(config, page, scenario.guarded, upm)


def run_once(scenario: Scenario, case: Case, host: Host) -> None:
    """The case with everything in pages of 4 KiB."""
    with make_rig(scenario, case, host) as rig:
        scenario.host(rig)


def run(scenario: Scenario, case: Case, host: Host, subtest: Subtest) -> None:
    """The case with each size of shared pages; private pages are 4 KiB."""
    for name, page in (("4K", PAGE_4K), ("2M", PAGE_2M)):
        with subtest(f"shared {name} private 4K"), make_rig(scenario, case, host, page) as rig:
            scenario.host(rig)
