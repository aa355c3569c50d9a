"""The names under which the model's machine is found: /dev/kvm, /dev/sev and the parameters of the kvm modules.

A name is compared as the program says it; one that is relative or has needless parts is made absolute first. A link
somewhere else to one of them is not seen: what it opens is the real one (dispatch.py refuses that).
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmapi.model.platform import Platform

_AT_FDCWD = -100
_MODULES = "/sys/module/kvm"
_KVM_MINOR, _SEV_MINOR, _MISC_MAJOR = 232, 125, 10
_PAGE = 4096
_STAT = struct.Struct("<QQQIIIIQqqq6Q24x")  # struct stat of x86-64: 144 bytes
_STATX_MASK = 0x7FF  # STATX_BASIC_STATS
_STATX = struct.Struct("<IIQIIIHHQQQQ")  # up to and without the time stamps
_STATX_SIZE = 256


def absolute(name: bytes, tid: int, directory: int) -> str | None:
    """The path that a thread means, if it can be one of ours: None otherwise. `directory` is its dirfd."""
    if not name.endswith((b"kvm", b"sev")) and b"module/kvm" not in name:
        return None
    text = os.fsdecode(name)
    if not text.startswith("/"):
        directory = directory - (1 << 32) if directory >> 31 & 1 else directory
        base = f"/proc/{tid}/cwd" if directory == _AT_FDCWD else f"/proc/{tid}/fd/{directory}"
        try:
            text = f"{os.readlink(base)}/{text}"
        except OSError:
            return None
    return os.path.normpath(text).replace("//", "/")


class Paths:
    """What stands at which name on one platform."""

    def __init__(self, platform: Platform) -> None:
        self._devices = {"/dev/kvm": _KVM_MINOR} | ({"/dev/sev": _SEV_MINOR} if platform.has_sev else {})
        self._parameters = _parameters(platform)

    @staticmethod
    def concerns(path: str) -> bool:
        """Is this name ours to answer, even if only with "there is none"?"""
        return path in ("/dev/kvm", "/dev/sev") or path == _MODULES or path.startswith((_MODULES + "/", _MODULES + "_"))

    def is_device(self, path: str) -> bool:
        """One of the device nodes that are there?"""
        return path in self._devices

    def parameter(self, path: str) -> bytes | None:
        """The content of a module parameter's file."""
        return self._parameters.get(path)

    def is_folder(self, path: str) -> bool:
        """A directory above the parameters?"""
        return any(name.startswith(path + "/") for name in self._parameters)

    def mode(self, path: str) -> int | None:
        """Type and permissions; None: there is nothing."""
        if path in self._devices:
            return stat.S_IFCHR | 0o666
        if path in self._parameters:
            return stat.S_IFREG | 0o444
        return stat.S_IFDIR | 0o755 if self.is_folder(path) else None

    def stat(self, path: str) -> bytes:
        """struct stat of what is there."""
        return pack_stat(self._fields(path))

    def statx(self, path: str) -> bytes:
        """struct statx of what is there."""
        return pack_statx(self._fields(path))

    def _fields(self, path: str) -> Fields:
        mode = self.mode(path) or 0
        rdev = os.makedev(_MISC_MAJOR, self._devices[path]) if path in self._devices else 0
        inode = 1 + sorted([*self._devices, *self._parameters]).index(path) if not stat.S_ISDIR(mode) else 1000 + len(path)
        return Fields(0x5E, inode, mode, 1, 0, 0, rdev, _PAGE if stat.S_ISREG(mode) else 0)


class Fields:
    """What stat(2) tells; times are 0."""

    def __init__(self, device: int, inode: int, mode: int, links: int, uid: int, gid: int, rdev: int, size: int) -> None:
        self.device, self.inode, self.mode, self.links = device, inode, mode, links
        self.uid, self.gid, self.rdev, self.size = uid, gid, rdev, size


def pack_stat(f: Fields) -> bytes:
    """struct stat (asm/stat.h)."""
    return _STAT.pack(f.device, f.inode, f.links, f.mode, f.uid, f.gid, 0, f.rdev, f.size, _PAGE, f.size // 512, *(0,) * 6)


def pack_statx(f: Fields) -> bytes:
    """struct statx (linux/stat.h)."""
    head = _STATX.pack(_STATX_MASK, _PAGE, 0, f.links, f.uid, f.gid, f.mode, 0, f.inode, f.size, f.size // 512, 0)
    devices = struct.pack("<IIII", os.major(f.rdev), os.minor(f.rdev), os.major(f.device), os.minor(f.device))
    return (head + bytes(64) + devices).ljust(_STATX_SIZE, b"\0")


def _parameters(platform: Platform) -> dict[str, bytes]:
    """The module parameters of the modelled machine, in the kernel's spelling."""
    values = {
        "kvm/parameters": {
            "enable_pmu": "N", "enable_vmware_backdoor": "N", "force_emulation_prefix": "0", "halt_poll_ns": "200000",
            "ignore_msrs": "N", "nx_huge_pages": "N", "report_ignored_msrs": "Y", "tdp_mmu": "Y", "eager_page_split": "Y",
        },
        "kvm_amd/parameters": {
            "avic": "N", "debug_swap": _yes(platform.vmsa_features), "lbrv": "0", "nested": "0", "npt": "Y", "nrips": "1",
            "sev": _yes(platform.has_sev), "sev_es": _yes(platform.has_sev_es), "sev_snp": "N", "vgif": "0", "vls": "0", "vnmi": "N",
        },
    }  # fmt: skip
    return {f"/sys/module/{module}/{name}": f"{value}\n".encode() for module, rows in values.items() for name, value in rows.items()}


def _yes(value: object) -> str:
    return "Y" if value else "N"
