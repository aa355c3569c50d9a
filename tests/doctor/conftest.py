"""Made-up machines for the doctor: a directory for /dev, /proc and /sys, and a few lines that play a kernel at the seam."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import ioctls
from vmm.facts import Surroundings

Machine = Callable[..., Surroundings]


@dataclass
class PlayedHost:
    """A kernel that answers from two tables; what is not in them is refused as Linux refuses it."""

    capabilities: dict[int, int] = field(default_factory=dict)
    answers: dict[int, int] = field(default_factory=dict)
    open_error: int = 0
    name: str = "kernel"
    opened: set[int] = field(default_factory=set)

    def open(self, path: str, flags: int) -> int:
        if self.open_error:
            raise OSError(self.open_error, os.strerror(self.open_error), path)
        return self._fd()

    def close(self, fd: int) -> None:
        self.opened.remove(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        assert fd in self.opened
        if request == ioctls.KVM_CHECK_EXTENSION:
            return self.capabilities.get(arg, 0)
        if request == ioctls.KVM_CREATE_VM and request not in self.answers:
            return self._fd()
        if request == ioctls.KVM_GET_API_VERSION:
            return self.answers.get(request, 12)
        return self.answers.get(request, -errno.ENOTTY)

    def _fd(self) -> int:
        self.opened.add(1000 + len(self.opened))
        return 999 + len(self.opened)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Make a machine from {path: text} and a played host; no model, no tools unless given."""

    def make(files: dict[str, str] | None = None, host: Any = None, **changes: Any) -> Surroundings:
        for path, text in (files or {}).items():
            target = tmp_path / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

        def open_kernel() -> Any:
            return host or PlayedHost(open_error=errno.ENOENT)

        def open_model() -> Any:
            return PlayedHost(capabilities={235: 0x7}, name="model")

        values: dict[str, Any] = {"open_kernel": open_kernel, "open_model": open_model, "which": lambda _name: None, "probe_guests": False}
        return Surroundings(root=tmp_path, **{**values, **changes})

    return make
