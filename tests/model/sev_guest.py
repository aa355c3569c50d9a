"""Test support: a launched SEV guest on the model, running short pieces of machine code.

`SevGuest` is a LongGuest of VM type SEV whose memory below `private` was encrypted by LAUNCH_UPDATE_DATA. Through the
identity map the guest uses it with the C-bit; through ALIAS it sees the same pages with the C-bit clear. `ask` runs
code and gives RAX at its HLT.
"""

from __future__ import annotations

import hashlib
from typing import Any, Self

from kvmapi.exits import Hlt
from kvmapi.host import Host
from kvmapi.launch import Launch, Measured, Running, Started
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import CODE, MIB, LongGuest, code

C_MASK = 1 << 51
SEV = 2

LOAD = code("488b03f4", "mov rax, [rbx]; hlt")
STORE = code("488903f4", "mov [rbx], rax; hlt")


class SevGuest(LongGuest):
    """Launched and ready to run; `launch=False` stops before LAUNCH_START."""

    def __init__(
        self, host: Host, text: bytes = LOAD + STORE, *, size: int = 2 * MIB, private: int | None = None, vcpus: int = 1, **launch: Any
    ) -> None:
        # INIT2 comes before vCPUs and slots, so the parts are put together here.
        super().__init__(host, text, SEV, size, c_mask=C_MASK, vcpus=0)
        self.platform = SevPlatform(host)
        self.closing.append(self.platform)
        self.launch = Launch(self.vm, self.platform).init2()
        for _ in range(vcpus):
            self.start_long(self.add_vcpu())
        private = size if private is None else private
        self.digest = hashlib.sha256(self.get(0, private)).digest()
        self.started: Started = self.launch.start(launch.get("policy", 0), launch.get("dh_cert"), launch.get("session"))
        self.started.update_data(self.hva, private)
        self.measured: Measured = self.started.measure()
        self.running: Running = self.measured.finish()

    def __enter__(self) -> Self:
        return self

    def load(self, va: int) -> int:
        """What the guest reads at `va` (8 bytes)."""
        assert self.again(rbx=va) == Hlt()
        return int(self.regs().rax)

    def store(self, va: int, value: int) -> None:
        """Let the guest write 8 bytes."""
        assert self.again(rip=CODE + len(LOAD), rbx=va, rax=value) == Hlt()
