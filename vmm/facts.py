"""A fact about this host: what was asked, what answered, and what to do about a no.

`doctor` collects facts, `sevmm doctor` shows them, tests take their skip texts from them. A fact is data and never raises; whoever gathers
facts does so through `Surroundings`, so that a test can put a made-up machine in its place: other directories for /dev, /proc and /sys,
another way to open a host, other tools.

States: "ok" it is there; "no" it is not, and the remedy says how to get it where there is a way; "unknown" it could not be asked.
"""

from __future__ import annotations

import errno as errnos
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmapi.host import Host

OK = "ok"
NO = "no"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fact:
    """One thing asked of this host.

    `name` is stable (the key in JSON and in tests), `title` is for people, `evidence` is one line that quotes the question and the
    answer, `remedy` says what to do when the state is not ok (empty: nothing to do, or nothing known).

        >>> Fact("gcc", "C compiler", "no", "no gcc on PATH", "apt install gcc").missing
        'no gcc on PATH; get it: apt install gcc'
    """

    name: str
    title: str
    state: str
    evidence: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """True only for what is known to be there."""
        return self.state == OK

    @property
    def missing(self) -> str:
        """Why this is not there and how to get it, as one sentence; empty when it is there."""
        if self.ok:
            return ""
        return f"{self.evidence}; get it: {self.remedy}" if self.remedy else self.evidence

    def to_json(self) -> dict[str, Any]:
        """The object in `sevmm doctor --json`."""
        return asdict(self)


def kernel_host() -> Host:
    """The real kernel behind the seam."""
    from kvmapi.kernel import KernelHost

    return KernelHost()


def model_host() -> Host:
    """The software model behind the seam."""
    from kvmapi.model.host import ModelHost

    return ModelHost()


@dataclass(frozen=True)
class Surroundings:
    """Where facts come from. The default is this machine.

    `root` stands before /dev, /proc and /sys; `open_kernel` and `open_model` make the Hosts whose /dev/kvm is asked; `which`
    finds programs; `probe_guests` says whether a guest of a few instructions may be run to see what a capability is worth.
    """

    root: Path = Path("/")
    open_kernel: Callable[[], Host] = kernel_host
    open_model: Callable[[], Host] = model_host
    which: Callable[[str], str | None] = shutil.which
    probe_guests: bool = True

    def path(self, absolute: str) -> Path:
        """A path of the machine, below `root`."""
        return self.root / absolute.lstrip("/")

    def read(self, absolute: str) -> str | None:
        """The text of a small file, stripped; None when it cannot be read."""
        try:
            return self.path(absolute).read_text(errors="replace").strip()
        except OSError:
            return None


def errno_words(number: int) -> str:
    """`ENOTTY (Inappropriate ioctl for device)` for a positive errno."""
    return f"{errnos.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"
