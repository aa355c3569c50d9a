"""`--fallthrough`: VMs of the types that this machine's KVM has run there, the others on the model.

The program opens the real /dev/kvm, and its calls on that fd go to the kernel, but for the few whose answer is about
both: which VM types there are, what CPUID a guest may have (SEV's leaf is the model's), and SEV's attributes. A VM of a
type that the kernel lacks is one of the model's, and so is everything that comes from it. /dev/sev is the model's.

A plain VM that asks for SEV in the old way (KVM_SEV_INIT on type 0) is the kernel's, which says what it can.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

from kvmapi.abi import caps, ioctls, sev
from kvmapi.kernel import KernelHost
from kvmapi.model.host import device

if TYPE_CHECKING:
    from vmm.exec.caller import Call
    from vmm.exec.supervisor import Supervisor

KVM_RDEV = os.makedev(10, 232)
_ENTRY = struct.Struct("<IIIIIII12x")  # kvm_cpuid_entry2
_MOST_ENTRIES = 256
_SEV_LEAF, _EXTENDED = 0x8000001F, 0x80000000
_U32 = 0xFFFFFFFF


def is_kvm(tgid: int, tid: int, fd: int) -> bool:
    """Is this fd of a thread an open of the machine's own /dev/kvm, and not of its name only (O_PATH)?"""
    with contextlib.suppress(OSError):
        if is_node(os.stat(f"/proc/{tgid}/task/{tid}/fd/{fd}")):
            with open(f"/proc/{tgid}/task/{tid}/fdinfo/{fd}", "rb") as lines:
                return not any(line.startswith(b"flags:") and int(line.split()[1], 8) & os.O_PATH for line in lines)
    return False


def is_node(status: os.stat_result) -> bool:
    """Is this file the machine's own /dev/kvm?"""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == KVM_RDEV


class Fallthrough:
    """The machine's own KVM, beside the model. OSError: it cannot be opened."""

    kind = "kvm"  # as the model's device

    def __init__(self, supervisor: Supervisor) -> None:
        self._platform = supervisor.platform
        self._host = KernelHost()
        self._fd = self._host.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        found = self._host.ioctl(self._fd, ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_VM_TYPES)
        self._kernel_types = found if found > 0 else 1  # before there were types, there was one

    @staticmethod
    def opens(name: str) -> bool:
        """Does the kernel open this name itself? Its modules' parameters, too, where it has them."""
        return name == "/dev/kvm" or (name != "/dev/sev" and os.path.exists(name))

    def answer(self, call: Call, request: int, arg: int) -> int | None:
        """A call on the real /dev/kvm: the result, or None where the kernel answers it."""
        if request == ioctls.KVM_CREATE_VM:
            if arg < 64 and self._kernel_types >> arg & 1:
                return None
        elif request == ioctls.KVM_CHECK_EXTENSION:
            if arg != caps.KVM_CAP_VM_TYPES:
                return None
            return self._kernel_types | self._platform.vm_types
        elif request == ioctls.KVM_GET_SUPPORTED_CPUID:
            return self._cpuid(call, arg)
        elif request in (ioctls.KVM_HAS_DEVICE_ATTR, ioctls.KVM_GET_DEVICE_ATTR):
            group = struct.unpack("<4xI", call.memory.read(arg, 8))[0]
            if group != sev.KVM_X86_GRP_SEV:
                return None
        else:
            return None
        model = device(self._platform, "/dev/kvm", os.O_RDWR)
        try:
            return model.ioctl(request, arg, call)
        finally:
            model.fd_closed()

    def _cpuid(self, call: Call, arg: int) -> int:
        """The kernel's table, with the model's leaf about SEV."""
        import ctypes

        buffer = ctypes.create_string_buffer(struct.pack("<II", _MOST_ENTRIES, 0), 8 + _MOST_ENTRIES * 40)
        result = self._host.ioctl(self._fd, ioctls.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(buffer))
        if result < 0:
            return result
        count = struct.unpack_from("<I", buffer)[0]
        rows = [_ENTRY.unpack_from(buffer, 8 + index * 40) for index in range(count)]
        sev_rows: list[tuple[int, ...]] = [tuple(row) for row in self._platform.supported_cpuid() if row[0] == _SEV_LEAF]
        rows = [row for row in rows if row[0] != _SEV_LEAF] + sev_rows
        rows = [(*row[:3], max(row[3], _SEV_LEAF), *row[4:]) if row[0] == _EXTENDED and sev_rows else row for row in rows]
        room = struct.unpack("<I4x", call.memory.read(arg, 8))[0]
        if room < len(rows):
            return -errno.E2BIG
        call.memory.write(arg + 8, b"".join(_ENTRY.pack(*row) for row in rows))
        call.memory.write(arg, struct.pack("<I", len(rows)))
        return 0

    def close(self) -> None:
        """Give the device back."""
        self._host.close(self._fd)
