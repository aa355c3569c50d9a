"""MAP_GPA_RANGE in the RFC dialects: bits by which a guest says what its accesses are, answered by KVM (rule.py).

Checks in the order of V3 of the tests' series (arch/x86/kvm/x86.c): KVM_CAP_EXIT_HYPERCALL must be on, the range page-aligned
and not wrapping; only the dialect with one range per vCPU takes a MARK or CLR of no pages.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.model.caller import PAGE, Errno
from kvmapi.model.cpu.hypercalls import Hypercalls

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu
    from kvmapi.model.cpu.policy import ExitPolicy
    from kvmapi.model.dialects.rule import Rule

_U64 = 1 << 64
_GFNS = 1 << 52


class DialectHypercalls(Hypercalls):
    """The hypercalls of one vCPU of a VM with such a rule."""

    def __init__(self, cpu: Cpu, policy: ExitPolicy, rule: Rule) -> None:
        super().__init__(cpu, policy)
        self._rule = rule

    def _map_gpa_range(self, gpa: int, pages: int, attributes: int, long: bool, done: Callable[[int], None]) -> int | None:
        gfn = gpa // PAGE
        if gpa % PAGE or gfn + pages >= _U64:
            done(-errno.EINVAL)
            return None
        within = min(pages, _GFNS - gfn)  # there is nothing beyond
        try:
            exits = self._rule.hypercall(gfn, pages, within, attributes)
        except Errno as failure:
            done(-failure.number)
            return None
        if not exits:
            done(0)
            return None

        def answered(result: int) -> None:
            if result:
                self._rule.settle(gfn, within)  # user space refused it
            done(result)

        return self._exit(gpa, pages, attributes, long, answered)
