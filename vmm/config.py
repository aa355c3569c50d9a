"""What a machine is to be: values with defaults, and the sentence for each combination that no host can build.

Nothing here asks a host: `check` says what is a mistake wherever one asks, before anything is opened. What only this host cannot do
is `vmm.rungs.Unsupported`, and said by whoever finds out (`vmm.probe`, `vmm.machine`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmm import boot
from vmm.image import LINUX32, LINUX64, MULTIBOOT, SEVMM, Image

if TYPE_CHECKING:
    from kvmapi.host import Host

_POLICY_ES = 1 << 2


class ConfigError(Exception):
    """What was asked for cannot be built by any host; one sentence."""


@dataclass(frozen=True)
class MachineConfig:
    """What to build, and on which host (None: not chosen yet; enough for `check`). `type` is a key of `vmm.rungs.TYPES`; `memory` in
    bytes; `policy` of a SEV launch, None = the default.

    `secret`: what a SEV guest's owner gives it after the measurement matched; `record`: keep the hash of everything measured; `progress`:
    see `vmm.launch.Progress`.

    `hypercalls`: whether the host delivers MAP_GPA_RANGE exits when it offers them (see `vmm.probe`). `lazy_private`: give the test
    area the PRIVATE attribute and no guest_memfd, so that its first touch is a memory fault (SW_PROTECTED only). `irqchip`: interrupt
    controllers in the kernel, with which vCPUs other than 0 wait for a startup IPI (SEV-ES only: on other types that IPI would start
    them in real mode). `dialect`: the kernel's KVM is that of an RFC (`kvmapi.dialects`).
    """

    image: Image
    host: Host | None = None
    type: str = "plain"
    memory: int = 64 << 20
    vcpus: int = 1
    policy: int | None = None
    arguments: bytes = b""
    hypercalls: bool = True
    lazy_private: bool = False
    irqchip: bool = False
    dialect: str = "mainline"
    console: Callable[[bytes], None] | None = None
    secret: bytes | bytearray | None = field(default=None, repr=False)
    record: bool = False
    progress: Callable[[int, int], None] | None = None

    def check(self) -> None:
        """Raises `ConfigError` for what no host can build."""
        if self.memory < boot.MIN_MEMORY:
            raise ConfigError(f"{self.memory} bytes of memory are too little: a guest needs at least {boot.MIN_MEMORY >> 20} MiB")
        if self.memory > boot.MAX_MEMORY:
            raise ConfigError(f"{self.memory >> 30} GiB of memory are too much: at most {boot.MAX_MEMORY >> 30} GiB fit the page tables")
        if self.memory % boot.LARGE:
            raise ConfigError(f"memory of {self.memory} bytes is not a multiple of 2 MiB")
        if not 1 <= self.vcpus <= boot.MAX_VCPUS:
            raise ConfigError(f"{self.vcpus} vCPUs: there must be 1 to {boot.MAX_VCPUS}")
        if len(self.arguments) > boot.MAX_ARGUMENTS or b"\0" in self.arguments:
            raise ConfigError(f"the guest's arguments must be at most {boot.MAX_ARGUMENTS} bytes without NUL")
        if self.policy is not None and not self.type.startswith("sev"):
            raise ConfigError(f"a launch policy means nothing to a VM of type {self.type}")
        if self.policy is not None and not 0 <= self.policy < 1 << 32:
            raise ConfigError(f"policy {self.policy:#x} does not fit 32 bits")
        if self.policy is not None and bool(self.policy & _POLICY_ES) != (self.type == "sev-es"):
            wrong = "has the SEV-ES bit (0x4), which" if self.policy & _POLICY_ES else "lacks the SEV-ES bit (0x4), without which"
            raise ConfigError(f"policy {self.policy:#x} {wrong} no firmware launches a guest of type {self.type}")
        if self.secret is not None and not self.type.startswith("sev"):
            raise ConfigError(f"a VM of type {self.type} has no owner who could give it a secret: use type sev")
        if self.secret is not None and not 1 <= len(self.secret) <= boot.MAX_SECRET:
            raise ConfigError(f"a secret of {len(self.secret)} bytes: it must have 1 to {boot.MAX_SECRET}")
        if self.image.protocol != SEVMM:
            self._check_foreign()
        if self.lazy_private and self.type != "sw-protected":
            raise ConfigError(f"a test area that becomes shared by faults needs type sw-protected, not {self.type}")
        if self.irqchip and self.type != "sev-es":
            raise ConfigError(f"a guest that starts its vCPUs by IPIs in 64-bit mode needs type sev-es, not {self.type}")

    def _check_foreign(self) -> None:
        """A guest that was written for a PC."""
        from vmm.linux_boot import command_line_limit

        kind = "Multiboot" if self.image.protocol == MULTIBOOT else "Linux"
        if self.type != "plain":
            raise ConfigError(f"{self.image.path} is a {kind} image, which runs on type plain only, not on {self.type}")
        low = boot.memory_layout(self.memory)[0][1]
        if self.image.end > low:
            raise ConfigError(
                f"{self.image.path} needs memory up to {self.image.end:#x}: ask for --memory {-(-self.image.end >> 20)}M or more"
            )
        if self.image.protocol in (LINUX32, LINUX64) and len(self.arguments) > command_line_limit(self.image):
            raise ConfigError(f"{self.image.path} takes a command line of at most {command_line_limit(self.image)} bytes")
