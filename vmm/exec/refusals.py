"""Why a host cannot run the supervisor, and what to change: words for what the kernel answered.

Three things can be forbidden: seccomp user notification (old kernels, containers, a supervisor that is there already), reading
and writing the program's memory, and stopping its threads for the moment in which guest RAM becomes shared (both Yama's and the
containers' business). Facts: kernel/seccomp.c, Documentation/admin-guide/LSM/Yama.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

from kvmapi.words import errno_words
from vmm.exec.options import CannotExec

OLDEST = (5, 19)
"""The first kernel with SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV."""

CONTAINERS = (
    "docker and podman: --security-opt seccomp=unconfined, or a profile that allows seccomp(2) and prctl(2);"
    " Kubernetes: securityContext.seccompProfile.type: Unconfined; systemd: a SystemCallFilter that lists seccomp"
)
_PTRACE = (
    "docker and podman: --cap-add SYS_PTRACE or --security-opt seccomp=unconfined; Kubernetes: securityContext.capabilities.add SYS_PTRACE"
)
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_STATUS = Path("/proc/self/status")
NO_THREADS = "no more processes or threads can be started here: raise `ulimit -u` or `ulimit -v`, or the container's limit of processes"


def install_refused(number: int, status: Path = _STATUS) -> CannotExec:
    """seccomp(2) with a new listener failed with errno `number`."""
    release = os.uname().release
    if number == errno.EBUSY:
        return CannotExec(
            "this process is supervised through seccomp user notification already: by another sevmm exec around this one"
            " (leave one of them out), or by the container's runtime (a seccomp profile without SCMP_ACT_NOTIFY)"
        )
    if number == errno.EINVAL or (number == errno.ENOSYS and not filtered(status)):
        old = _version(release) < OLDEST
        what = f"Linux {release} is too old" if old else f"Linux {release} was built without it (CONFIG_SECCOMP_FILTER)"
        return CannotExec(f"it needs seccomp user notification of Linux {OLDEST[0]}.{OLDEST[1]} or later; {what}")
    if number in (errno.EPERM, errno.ENOSYS, errno.EACCES):
        where = "a seccomp filter around this process" if filtered(status) else "a security policy"
        return CannotExec(f"{where} forbids seccomp user notification: {errno_words(number)}; allow it: {CONTAINERS}")
    return CannotExec(f"seccomp user notification failed: {errno_words(number)}")


def news_refused(number: int) -> CannotExec:
    """inotify_init1(2) failed with errno `number`."""
    if number == errno.EMFILE:
        return CannotExec("too many of your processes use inotify: raise sysctl fs.inotify.max_user_instances")
    return CannotExec(f"inotify cannot be used here: {errno_words(number)}")


def memory_refused(number: int, yama: Path = _YAMA) -> CannotExec:
    """The program's memory, or its threads, cannot be reached: errno `number` of process_vm_readv or ptrace."""
    scope = _scope(yama)
    if scope >= 3:
        return CannotExec(
            f"Yama forbids it to reach the program's memory (kernel.yama.ptrace_scope is {scope}, and stays so until a reboot):"
            " boot without that setting; 0, 1 and 2 with CAP_SYS_PTRACE will do"
        )
    if scope == 2:
        return CannotExec("Yama lets only CAP_SYS_PTRACE reach a program's memory: sysctl kernel.yama.ptrace_scope=1, or run as root")
    return CannotExec(f"the program's memory cannot be reached: {errno_words(number)}; in a container, allow it: {_PTRACE}")


def reach(child: int) -> int:
    """0 if the memory of our `child`, which has not become another program yet, can be read and written; else the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, there = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)
    remote = (ctypes.c_uint64 * 2)(ctypes.addressof(there), 8)
    done = libc.process_vm_readv(child, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done != 8 and ctypes.get_errno() not in (errno.ESRCH, errno.EFAULT):
        return ctypes.get_errno()
    if libc.process_vm_writev(child, None, 0, None, 0, 0) < 0:  # of nothing: whether a filter forbids the call itself
        return 0 if ctypes.get_errno() == errno.ESRCH else ctypes.get_errno()
    return 0


def files_refused() -> int:
    """Why we cannot make the files that stand for the program's fds: an errno, or 0 where we can."""
    try:
        os.close(os.memfd_create("sevmm:try", os.MFD_CLOEXEC))
    except OSError as failure:
        return failure.errno or errno.EPERM
    return 0


def filtered(status: Path = _STATUS) -> bool:
    """Is this process under a seccomp filter itself?"""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False
    return any(line.split() == ["Seccomp:", "2"] for line in lines)


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else OLDEST


def _scope(yama: Path) -> int:
    try:
        return int(yama.read_text())
    except (OSError, ValueError):
        return 0
