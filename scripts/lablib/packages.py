"""What the machine must have for the lab, found by looking for the thing itself (a command, a header), and the package that brings it.

Purposes: `run` (boot the lab that is cached), `init` (compile its first process), `build` (source and kernel) and `selftests`. Nothing is
installed without being asked for: `--install` uses apt-get, as root or through `sudo -n`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lablib.words import Failure, Progress, run_logged, say


@dataclass(frozen=True)
class Need:
    """A command that PATH must have, or a header (a path under the include directories)."""

    thing: str
    package: str

    def present(self) -> bool:
        if not self.thing.endswith((".h", ".a")):
            return shutil.which(self.thing) is not None
        folders = ("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/include")
        return any((Path(folder) / self.thing).exists() for folder in folders)


COMPILER = (Need("gcc", "gcc"), Need("ld", "binutils"), Need("stdlib.h", "libc6-dev"), Need("libc.a", "libc6-dev"))

NEEDS: dict[str, tuple[Need, ...]] = {
    "run": (Need("qemu-system-x86_64", "qemu-system-x86"), Need("setpriv", "util-linux")),
    "init": COMPILER,
    "build": (
        *COMPILER,
        Need("apt-get", "apt"), Need("dpkg-deb", "dpkg"), Need("tar", "tar"), Need("xz", "xz-utils"), Need("make", "make"),
        Need("perl", "perl"), Need("flex", "flex"), Need("bison", "bison"), Need("bc", "bc"), Need("lz4", "lz4"),
        Need("gelf.h", "libelf-dev"), Need("openssl/opensslv.h", "libssl-dev"),
    ),
    "selftests": (Need("uuid/uuid.h", "uuid-dev"),),
}  # fmt: skip


def missing(*purposes: str) -> list[str]:
    """Packages that these purposes lack here, each once."""
    needs = [need for purpose in purposes for need in NEEDS[purpose]]
    return list(dict.fromkeys(need.package for need in needs if not need.present()))


def how_to_get(packages: list[str]) -> str:
    """The remedy, in words."""
    return f"get it: scripts/lab setup --install, or apt-get install {' '.join(packages)}"


def ensure(purposes: Sequence[str], install: bool, log: Path) -> None:
    """Raise `Failure` naming the packages that are missing; with `install`, fetch them first."""
    lacking = missing(*purposes)
    if lacking and install:
        _install(lacking, log)
        lacking = missing(*purposes)
    if lacking:
        raise Failure(f"step packages failed: this machine lacks {', '.join(lacking)}\n{how_to_get(lacking)}")


def _install(packages: list[str], log: Path) -> None:
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if as_root and subprocess.run([*as_root, "true"], capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode != 0:
        raise Failure(f"step packages failed: --install needs root, or sudo without a password\napt-get install {' '.join(packages)}")
    say(f"packages: apt-get install {' '.join(packages)}")
    progress = Progress("packages")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_logged([*as_root, "apt-get", "update", "-q"], log, progress, env=environment)
    except Failure as failure:
        say(f"packages: {failure}\ngoing on with the lists that are there")
    try:
        run_logged([*as_root, "apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], log, progress, env=environment)
    except Failure as failure:
        raise Failure(f"step packages failed: {failure}") from failure
    progress.done("installed")
