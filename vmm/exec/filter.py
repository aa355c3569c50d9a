"""Which system calls of a traced program come to us: a classic BPF program for seccomp.

It can look at numbers only, never behind a pointer, so it errs on the side of asking: every open and every question about
a path comes, because the path may be /dev/kvm. Everything that a program does often and that is not ours stays in the
kernel: reads and writes, memory, signals, clocks.

Fds of guest_memfds get high numbers (`high` and up), because reading, writing and fstat of them must be answered by us:
the filter asks about those calls only there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

AUDIT_ARCH_X86_64, AUDIT_ARCH_I386 = 0xC000003E, 0x40000003
X32_BIT = 0x40000000

# x86-64 system call numbers (arch/x86/entry/syscalls/syscall_64.tbl)
READ, WRITE, OPEN, STAT, FSTAT, LSTAT, MMAP, IOCTL = 0, 1, 2, 4, 5, 6, 9, 16
PREAD64, PWRITE64, READV, WRITEV, ACCESS, MREMAP, MADVISE, EXECVE = 17, 18, 19, 20, 21, 25, 28, 59
GETXATTR, LGETXATTR, LISTXATTR, LLISTXATTR = 191, 192, 194, 195
FTRUNCATE, READLINK, OPENAT, NEWFSTATAT, READLINKAT, FACCESSAT, FALLOCATE = 77, 89, 257, 262, 267, 269, 285
PREADV, PWRITEV, EXECVEAT, PREADV2, PWRITEV2, STATX, OPENAT2, FACCESSAT2 = 295, 296, 322, 327, 328, 332, 437, 439
# i386 ones
I386_OPEN, I386_EXECVE, I386_IOCTL, I386_OPENAT, I386_EXECVEAT, I386_OPENAT2 = 5, 11, 54, 295, 358, 437

KVMIO = 0xAE
SEV_ISSUE_CMD = 0xC0105300  # the whole word: its type byte 'S' is also that of the CD-ROM ioctls
MAP_SHARED, MAP_ANONYMOUS = 0x1, 0x20
MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_COLLAPSE = 4, 8, 9, 25
AT_EMPTY_PATH = 0x1000

OPENS = (OPEN, OPENAT, OPENAT2)
XATTRS = (GETXATTR, LGETXATTR, LISTXATTR, LLISTXATTR)  # `ls -l` asks for them
ASKS = (ACCESS, FACCESSAT, FACCESSAT2, STAT, LSTAT, NEWFSTATAT, STATX, READLINK, READLINKAT, *XATTRS)
AT_OFFSETS = (PREAD64, PWRITE64, PREADV, PWRITEV)
TRANSFERS = (READ, WRITE, PREAD64, PWRITE64, READV, WRITEV, PREADV, PWRITEV, PREADV2, PWRITEV2)

_LOAD, _EQUAL, _SET, _GREATER, _AND, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06  # BPF: ld abs, jeq, jset, jge, and, ret
_ALLOW, _NOTIFY, _ERRNO = 0x7FFF0000, 0x7FC00000, 0x00050000
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data
_ENOSYS = 38

Jump = int | str
Line = str | tuple[int, Jump, Jump, int]


def _argument(index: int) -> int:
    """Offset of the low word of an argument."""
    return 16 + 8 * index


def assemble(lines: Sequence[Line]) -> bytes:
    """BPF code of a list of (code, jump if true, jump if false, k); a str is a label, and jumps may name one that follows.

    >>> len(assemble([(0x06, 0, 0, 0x7FFF0000)]))
    8
    """
    places: dict[str, int] = {}
    code: list[tuple[int, Jump, Jump, int]] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(code)
        else:
            code.append(line)

    def distance(jump: Jump, at: int) -> int:
        return places[jump] - at - 1 if isinstance(jump, str) else jump

    return b"".join(struct.pack("<HBBI", op, distance(true, at), distance(false, at), k) for at, (op, true, false, k) in enumerate(code))


def program(high: int) -> bytes:
    """The filter; guest_memfds stand at fd `high` and above."""
    load_fd: Line = (_LOAD, 0, 0, _argument(0))
    native: list[Line] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, "other", AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, _NR),
        (_GREATER, "absent", 0, X32_BIT),
        # the most frequent ones first
        *((_EQUAL, "transfer", 0, nr) for nr in TRANSFERS),
        (_EQUAL, "ioctl", 0, IOCTL),
        (_EQUAL, "mmap", 0, MMAP),
        (_EQUAL, "transfer", 0, FSTAT),
        (_EQUAL, "transfer", 0, FTRUNCATE),
        (_EQUAL, "madvise", 0, MADVISE),
        (_EQUAL, "at", 0, NEWFSTATAT),
        *((_EQUAL, "ask", 0, nr) for nr in (*OPENS, *ASKS, FALLOCATE, MREMAP, EXECVE, EXECVEAT) if nr != NEWFSTATAT),
        (_RETURN, 0, 0, _ALLOW),
        "at",  # glibc's fstat is newfstatat(fd, "", AT_EMPTY_PATH)
        (_LOAD, 0, 0, _argument(3)),
        (_SET, "transfer", "ask", AT_EMPTY_PATH),
        "transfer",
        load_fd,
        (_GREATER, "ask", "allow", high),
        "mmap",
        (_LOAD, 0, 0, _argument(3)),
        (_SET, "allow", 0, MAP_ANONYMOUS),
        (_SET, "ask", 0, MAP_SHARED),
        (_LOAD, 0, 0, _argument(4)),
        (_GREATER, "ask", "allow", high),
        "madvise",
        (_LOAD, 0, 0, _argument(2)),
        *((_EQUAL, "ask", 0, advice) for advice in (MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_COLLAPSE)),
        (_RETURN, 0, 0, _ALLOW),
        "ioctl",
        (_LOAD, 0, 0, _argument(1)),
        (_EQUAL, "ask", 0, SEV_ISSUE_CMD),
        (_AND, 0, 0, 0xFF00),
        (_EQUAL, "ask", "allow", KVMIO << 8),
    ]
    ends: list[Line] = [
        "ask",
        (_RETURN, 0, 0, _NOTIFY),
        "allow",
        (_RETURN, 0, 0, _ALLOW),
        "other",  # 32-bit code: its opens, to refuse /dev/kvm in words, and its execs
        (_EQUAL, 0, "absent", AUDIT_ARCH_I386),
        (_LOAD, 0, 0, _NR),
        *((_EQUAL, "ask32", 0, nr) for nr in (I386_OPEN, I386_OPENAT, I386_OPENAT2, I386_EXECVE, I386_EXECVEAT)),
        (_EQUAL, 0, "allow32", I386_IOCTL),
        (_LOAD, 0, 0, _argument(1)),
        (_AND, 0, 0, 0xFF00),
        (_EQUAL, "ask32", "allow32", KVMIO << 8),
        "allow32",
        (_RETURN, 0, 0, _ALLOW),
        "ask32",
        (_RETURN, 0, 0, _NOTIFY),
        "absent",
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    return assemble([*native, *ends])
