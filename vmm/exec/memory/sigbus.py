"""A traced program can cut a file off under our mapping of it. Our next access there would be SIGBUS, and the end of us.

A handler in machine code, because the access may come from the engine's code in any thread at any moment: when the address
lies in a registered range it puts zero pages over it, and the access goes on. The memory there is not the program's any
more, nor was it before. Of PROT_NONE parts of the ranges, SIGSEGV is handled alike. Anything else gets the action that
was there before the handler: it is restored, and the access happens once more.

Every rescue can cost two mappings, of which a process has 65530. So the first ones replace a page each, later ones 2 MiB,
in the end 1 GiB: parts of the ranges that were good may then be lost, which only a program that keeps on doing this sees.
Larger steps also serve huge pages, where a page alone cannot be replaced. `rescues` counts: when it changes, views must
be painted anew.

The same handler answers a CPUID of ours in a thread where it faults (`without_cpuid`), by letting it work from then on.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import threading

SLOTS = 4096  # ranges
FINE = 4096  # rescues by single pages; and as many by 2 MiB
_CODE, _COUNT, _OLD_BUS, _OLD_SEGV, _TABLE = 0, 1024, 1088, 1152, 4096
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTORER = 4, 0x08000000, 0x04000000
_SYS_SIGACTION, _MMAP = 13, 9
_FROM_KERNEL, _RIP = 0x80, 168  # si_code of a general protection fault; offset of RIP in ucontext_t
_ARCH_PRCTL, _ARCH_SET_CPUID = 158, 0x1012
_FREE = struct.pack("=2Q", 1, 0)  # matches nothing, and is not the table's end

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, use_errno=True)(
    ("syscall", _libc)
)


def _code(at: int) -> tuple[bytes, int]:
    """The handler for a room at `at`, and where in it the way back from a signal stands."""
    u64 = struct.Struct("<Q").pack
    u32 = struct.Struct("<I").pack
    parts: list[bytes | str | tuple[bytes, str]] = [
        b"\x89\xfb",  # mov ebx, edi: the signal
        b"\x83\x7e\x08\x00",  # cmp dword [rsi+8], 0: si_code
        (b"\x0f\x8e", "other"),  # jle: somebody sent it
        b"\x81\x7e\x08" + u32(_FROM_KERNEL),  # cmp dword [rsi+8], SI_KERNEL
        (b"\x0f\x85", "access"),  # jne
        b"\x48\x8b\x82" + u32(_RIP),  # mov rax, [rdx+...]: RIP where it happened
        b"\x66\x81\x38\x0f\xa2",  # cmp word [rax], cpuid
        (b"\x0f\x85", "access"),  # jne
        b"\xbf" + u32(_ARCH_SET_CPUID) + b"\xbe" + u32(1),  # mov edi, ARCH_SET_CPUID; mov esi, 1
        b"\xb8" + u32(_ARCH_PRCTL) + b"\x0f\x05",  # arch_prctl: it is executed once more, and works
        (b"\xe9", "done"),  # jmp
        "access",
        b"\x48\x8b\x6e\x10",  # mov rbp, [rsi+16]: si_addr
        b"\x49\xbc" + u64(at + _TABLE),  # mov r12, table
        "next",
        b"\x49\x8b\x04\x24",  # mov rax, [r12]
        b"\x48\x85\xc0",  # test rax, rax
        (b"\x0f\x84", "other"),  # jz
        b"\x49\x8b\x54\x24\x08",  # mov rdx, [r12+8]
        b"\x49\x83\xc4\x10",  # add r12, 16
        b"\x48\x39\xc5",  # cmp rbp, rax
        (b"\x0f\x82", "next"),  # jb
        b"\x48\x39\xd5",  # cmp rbp, rdx
        (b"\x0f\x83", "next"),  # jae
        b"\x49\xbd" + u64(at + _COUNT),  # mov r13, count
        b"\xb8\x01\x00\x00\x00",  # mov eax, 1
        b"\xf0\x49\x0f\xc1\x45\x00",  # lock xadd [r13], rax
        b"\x41\xbe\x00\x10\x00\x00",  # mov r14d, 4 KiB
        b"\x48\x3d" + u32(FINE),  # cmp rax, FINE
        (b"\x0f\x82", "map"),  # jb
        b"\x41\xc1\xe6\x09",  # shl r14d, 9
        b"\x48\x3d" + u32(2 * FINE),  # cmp rax, 2 * FINE
        (b"\x0f\x82", "map"),  # jb
        b"\x41\xc1\xe6\x09",  # shl r14d, 9
        "map",
        b"\x4c\x89\xf6",  # mov rsi, r14
        b"\x4c\x89\xf7",  # mov rdi, r14
        b"\x48\xf7\xdf",  # neg rdi
        b"\x48\x21\xef",  # and rdi, rbp
        b"\xba\x03\x00\x00\x00",  # mov edx, PROT_READ | PROT_WRITE
        b"\x41\xba\x32\x40\x00\x00",  # mov r10d, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE
        b"\x49\xc7\xc0\xff\xff\xff\xff",  # mov r8, -1
        b"\x45\x31\xc9",  # xor r9d, r9d
        b"\xb8" + u32(_MMAP) + b"\x0f\x05",  # mmap
        b"\x48\x3d\x01\xf0\xff\xff",  # cmp rax, -4095
        (b"\x0f\x82", "done"),  # jb
        b"\x41\xc1\xe6\x09",  # shl r14d, 9
        b"\x41\x81\xfe" + u32(1 << 30),  # cmp r14d, 1 GiB
        (b"\x0f\x86", "map"),  # jbe
        "other",
        b"\x89\xdf",  # mov edi, ebx
        b"\x48\xbe" + u64(at + _OLD_BUS),  # mov rsi, old action
        b"\x83\xff" + bytes([signal.SIGBUS]),  # cmp edi, SIGBUS
        (b"\x0f\x84", "restore"),  # je
        b"\x48\xbe" + u64(at + _OLD_SEGV),  # mov rsi, old action
        "restore",
        b"\x31\xd2",  # xor edx, edx
        b"\x41\xba\x08\x00\x00\x00",  # mov r10d, 8
        b"\xb8" + u32(_SYS_SIGACTION) + b"\x0f\x05",  # rt_sigaction
        "done",
        b"\xc3",  # ret
        "restorer",
        b"\xb8\x0f\x00\x00\x00\x0f\x05",  # rt_sigreturn
    ]
    places: dict[str, int] = {}
    length = 0
    for part in parts:
        if isinstance(part, str):
            places[part] = length
        else:
            length += len(part) if isinstance(part, bytes) else len(part[0]) + 4
    code = b""
    for part in parts:
        if isinstance(part, bytes):
            code += part
        elif isinstance(part, tuple):
            code += part[0] + struct.pack("<i", places[part[1]] - len(code) - len(part[0]) - 4)
    return code, places["restorer"]


class _Room:
    """The memory of the handler: its code and constants, then the table."""

    def __init__(self) -> None:
        size = _TABLE + 16 * (SLOTS + 1)
        self.memory = mmap.mmap(
            -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        code, restorer = _code(self.at)
        self.memory[: len(code)] = code
        action = ctypes.create_string_buffer(
            struct.pack("=4Q", self.at + _CODE, _SA_SIGINFO | _SA_ONSTACK | _SA_RESTORER, self.at + restorer, 0), 32
        )
        self.count = ctypes.c_uint64.from_address(self.at + _COUNT)
        for number, old in ((signal.SIGBUS, _OLD_BUS), (signal.SIGSEGV, _OLD_SEGV)):
            if _syscall(_SYS_SIGACTION, number, ctypes.addressof(action), self.at + old, 8) < 0:
                raise OSError(ctypes.get_errno(), "rt_sigaction")
        self.used = 0
        self.free: list[int] = []


_room: _Room | None = None
_lock = threading.Lock()


def _ready() -> _Room:
    """With the lock held."""
    global _room
    if _room is None:
        _room = _Room()
    return _room


def without_cpuid() -> bool:
    """CPUID faults in this thread, too, until it is executed: switching between it and a thread of the program, where CPUID
    faults, leaves the processor's setting alone then, and costs a third. False where CPUID cannot fault.
    """
    with _lock:
        _ready()
    return bool(_syscall(_ARCH_PRCTL, _ARCH_SET_CPUID, None, None, 0) == 0)


def register(start: int, end: int) -> int:
    """Accesses to [start, end) of our memory never end us. Returns what `unregister` takes. Raises OSError (ENOMEM)."""
    with _lock:
        room = _ready()
        if room.free:
            entry = room.free.pop()
        elif room.used < SLOTS:
            entry = room.used
            room.used += 1
        else:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        at = _TABLE + 16 * entry
        room.memory[at : at + 16] = struct.pack("=2Q", start, end)
        return entry


def unregister(entry: int) -> None:
    """The range is not ours any more."""
    with _lock:
        if _room is not None:
            at = _TABLE + 16 * entry
            _room.memory[at : at + 16] = _FREE
            _room.free.append(entry)


def rescues() -> int:
    """How often the handler has put zeros somewhere."""
    return int(_room.count.value) if _room is not None else 0
