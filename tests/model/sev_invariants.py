"""Three sentences that hold whatever happens, watched without the reference: only from what calls returned.

a guest is measured once, and not after it runs
a secret goes only into a guest that was measured and does not run yet
nobody reads or writes memory of a guest whose policy has NODBG
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmapi.abi import sev as s


class Violated(AssertionError):
    """One of the sentences is not true."""


@dataclass
class Invariants:
    """What was seen of each guest, by its handle."""

    measured: set[int] = field(default_factory=set)
    running: set[int] = field(default_factory=set)
    secrets: int = 0

    def saw(self, command: int, succeeded: bool, handle: int, policy: int) -> None:
        """A command for the guest `handle` came back; `succeeded`: with 0."""
        if not succeeded or not handle:
            return
        if command == s.KVM_SEV_LAUNCH_MEASURE:
            if handle in self.measured | self.running:
                raise Violated(f"guest {handle} was measured again")
            self.measured.add(handle)
        if command in (s.KVM_SEV_LAUNCH_FINISH, s.KVM_SEV_RECEIVE_FINISH):
            self.running.add(handle)
        if command == s.KVM_SEV_LAUNCH_SECRET:
            self.secrets += 1
            if handle not in self.measured or handle in self.running:
                raise Violated(f"a secret went into guest {handle}, which is {'running' if handle in self.running else 'not measured'}")
        if command in (s.KVM_SEV_DBG_DECRYPT, s.KVM_SEV_DBG_ENCRYPT) and policy & s.SEV_POLICY_NODBG:
            raise Violated(f"guest {handle} was debugged although its policy is {policy:#x}")
