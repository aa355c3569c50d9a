"""Arguments of ioctls for the fuzzer: half of them valid structs of the ioctl table with some fields changed, the others anything.

What the model is given to write to must not be memory that this process needs: a guest may store to any page of a memory slot, as with
a real kernel. So all memory that arguments name lies in one reservation of address space, in the middle of 16 TiB that nobody else has
(`Memory`); a size that is too large runs into pages without access there, not into the interpreter.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

from kvmapi.abi import ioctls, psp
from kvmapi.abi import vcpu as v
from kvmapi.abi.sev import kvm_sev_cmd
from kvmapi.table import Ioctl, commands, rows

RESERVED, RAM, SCRATCH = 1 << 44, 1 << 20, 1 << 16
PAGE = 4096
U64 = (1 << 64) - 1
ODD = (0, 1, 2, 7, 8, 4095, 4096, 1 << 31, 1 << 47, 1 << 63, U64, U64 - 4095, 0xFFFF888000000000, 0x7FFFFFFFF000)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_NORESERVE, _FIXED, _ANONYMOUS = 0x4000, 0x10, 0x20

# Requests that reach far into the model: they come more often than the others.
HEAVY = tuple(
    getattr(ioctls, f"KVM_{name}")
    for name in (
        "CREATE_VM", "CREATE_VCPU", "RUN", "RUN", "SET_USER_MEMORY_REGION", "SET_USER_MEMORY_REGION2", "SET_MEMORY_ATTRIBUTES",
        "CREATE_GUEST_MEMFD", "MEMORY_ENCRYPT_OP", "MEMORY_ENCRYPT_REG_REGION", "MEMORY_ENCRYPT_UNREG_REGION", "SET_SREGS", "SET_SREGS2",
        "SET_REGS", "SET_CPUID2", "SET_MSRS", "SET_FPU", "SET_XSAVE", "SET_VCPU_EVENTS", "SET_GUEST_DEBUG", "ENABLE_CAP", "GET_DIRTY_LOG",
        "CLEAR_DIRTY_LOG", "X86_SET_MSR_FILTER", "PRE_FAULT_MEMORY", "TRANSLATE",
    )
)  # fmt: skip
ANY = tuple(value for name, value in vars(ioctls).items() if name.startswith("KVM_") and isinstance(value, int))
UNKNOWN = (0, 0xAEFF, 0xFFFFFFFF, 1 << 40, -1, psp.SEV_ISSUE_CMD)
_ROWS: dict[int, list[Ioctl]] = {}
for _row in rows():
    _ROWS.setdefault(_row.number, []).append(_row)
_HEAVY_ON = {kind: tuple(n for n in HEAVY if any(row.on == kind for row in _ROWS[n])) for kind in ("system", "vm", "vcpu")}
# Guest code: pieces that leave the guest, fault, or touch memory; random bytes between them.
PIECES = tuple(
    bytes.fromhex(text)
    for text in (
        "f4", "e610", "ef", "f36e", "ec", "cd14", "0f0b", "cf", "fb", "fa", "9d", "0f30", "0f32", "0fa2", "0f01d9", "ff23", "8b03", "8903",
        "88073c", "c3", "ebfe", "e2fe", "0f22c0", "0f22e0", "a4", "f3aa", "90",
    )
)  # fmt: skip


def _map(address: int, size: int, protection: int, flags: int) -> int:
    where = _libc.mmap(address, size, protection, mmap.MAP_PRIVATE | _ANONYMOUS | flags, -1, 0)
    if where in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {size:#x} bytes: errno {ctypes.get_errno()}")
    return int(where)


class Memory:
    """The reservation: `ram` for memory slots, and a piece of `scratch` for each thread's arguments, each ending at a hole."""

    def __init__(self, threads: int) -> None:
        self._base = base = _map(0, RESERVED, 0, _NORESERVE)
        self.ram = _map(base + RESERVED // 2, RAM, 3, _FIXED)
        first = base + RESERVED // 4
        rng = random.Random(0)
        code = b"".join(rng.choice(PIECES) if rng.random() < 0.7 else rng.randbytes(2) for _ in range(RAM // 4))
        ctypes.memmove(self.ram, code, min(len(code), RAM))
        self.scratch = [_map(first + (number << 36), SCRATCH, 3, _FIXED) for number in range(threads)]

    def close(self) -> None:
        """Give the reservation back."""
        _libc.munmap(ctypes.c_void_p(self._base), ctypes.c_size_t(RESERVED))


class Arguments:
    """One thread's source of arguments. `fds` gives some fds that are open now."""

    def __init__(self, rng: random.Random, memory: Memory, thread: int, fds: Callable[[], list[int]]) -> None:
        self._rng = rng
        self._ram = memory.ram
        self._scratch = memory.scratch[thread]
        self._fds = fds

    def request(self, kind: str) -> int:
        """A request number, mostly one that this kind of fd has."""
        rng = self._rng
        which = rng.random()
        if which < 0.7:
            return rng.choice(_HEAVY_ON.get(kind, HEAVY))
        return rng.choice(ANY if which < 0.97 else UNKNOWN)

    def argument(self, request: int) -> int:
        """A value or an address for it."""
        rng = self._rng
        if request in (ioctls.KVM_CREATE_VM, ioctls.KVM_CREATE_VCPU) and rng.random() < 0.9:
            return rng.choice((0, 0, 1, 2, 3))
        if request == ioctls.KVM_RUN and rng.random() < 0.95:
            return 0
        if rng.random() < 0.1:
            return rng.choice(ODD)
        known = _ROWS.get(request & 0xFFFFFFFF)
        if known and rng.random() < 0.55:
            row = rng.choice(known)
            if row.struct is None:
                return rng.choice((0, 1, 2, 64, 4096, rng.choice(ODD)))
            return self._struct(row)
        return self._anything()

    def _anything(self) -> int:
        rng = self._rng
        data = b"".join((self.number() & U64).to_bytes(8, "little") for _ in range(24))
        off_the_end = rng.random() < 0.07
        at = SCRATCH - rng.randrange(1, 128) if off_the_end else rng.randrange(0, 1 << 12, rng.choice((1, 8)))
        ctypes.memmove(self._scratch + at, data, min(len(data), SCRATCH - at))
        return self._scratch + at

    def number(self) -> int:
        """A number that means something somewhere: an address, a size, an fd, a flag, or nothing at all."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.35:
            return rng.choice((0, 0, 1, 2, 3, 4, 8, 16, 22, 48))
        if kind < 0.5:
            return PAGE * rng.choice((1, 2, 16, 64, 256, 512, 513))
        if kind < 0.65:
            return rng.choice((self._ram, self._ram + PAGE * rng.randrange(RAM // PAGE), self._scratch, self._scratch + PAGE))
        if kind < 0.75:
            fds = self._fds()
            return rng.choice(fds) if fds else -1
        if kind < 0.85:
            return rng.choice(ODD)
        # A wild number that is an address of this process is as good as impossible; those of 32 bits are none.
        return rng.getrandbits(64) if kind < 0.95 else rng.getrandbits(32)

    def _struct(self, row: Ioctl) -> int:
        """A struct of the table, its fields plausible, then a few spoilt; with entries behind it where it has some."""
        rng = self._rng
        at = self._scratch + rng.randrange(0, 1 << 12, 8)
        entries = 0
        struct: Any = row.struct.from_address(at)  # type: ignore[union-attr]
        if isinstance(struct, ctypes.Structure):
            self._fill(struct)
        else:
            struct.value = self.number() & U64
        if row.count is not None and row.entry is not None:
            entries = rng.choice((0, 1, 3, 20))
            setattr(struct, row.count, entries)
            behind = at + ctypes.sizeof(struct)
            for number in range(entries):
                self._entry(row.entry.from_address(behind + number * ctypes.sizeof(row.entry)))
        if isinstance(struct, kvm_sev_cmd | psp.sev_issue_cmd):
            self._command(row.number, struct, at + 256)
        if rng.random() < 0.3:
            spoilt = at + rng.randrange(max(ctypes.sizeof(struct), 8))
            ctypes.c_uint8.from_address(spoilt).value = rng.getrandbits(8)
        return at

    def _entry(self, entry: Any) -> None:
        if isinstance(entry, v.kvm_msr_entry):
            entry.index = self._rng.choice((0x10, 0x1B, 0x174, 0x175, 0x277, 0xC0000080, 0xC0000081, 0xC0000100, 0xC0000102, 0xDEAD))
            entry.data = self.number() & U64
        elif isinstance(entry, v.kvm_cpuid_entry2):
            entry.function = self._rng.choice((0, 1, 7, 0xD, 0x80000000, 0x80000001, 0x80000008, 0x8000001F))
            entry.eax, entry.ebx = (self.number() & 0xFFFFFFFF for _ in range(2))
        elif isinstance(entry, ctypes.Structure):
            self._fill(entry)

    def _command(self, request: int, struct: Any, data: int) -> None:
        command = self._rng.choice(commands(request))
        name = "id" if hasattr(struct, "id") else "cmd"
        setattr(struct, name, command.id)
        if command.struct is not None:
            self._fill(command.struct.from_address(data))
        setattr(struct, "data", data) if hasattr(struct, "data") else None

    def _fill(self, struct: Any) -> None:
        for field in struct._fields_:
            name = field[0]
            value = getattr(struct, name)
            if isinstance(value, int):
                setattr(struct, name, self._field(name))
            elif isinstance(value, ctypes.Structure):
                self._fill(value)
            elif self._rng.random() < 0.05:  # arrays and unions: mostly what stood there
                raw = self._rng.randbytes(ctypes.sizeof(value))
                ctypes.memmove(ctypes.addressof(value), raw, len(raw))

    def _field(self, name: str) -> int:
        """A value that a field of this name may have."""
        rng = self._rng
        if rng.random() < 0.08:
            return self.number()
        if name in ("userspace_addr", "uaddr", "addr", "dirty_bitmap", "guest_uaddr", "trans_uaddr", "hdr_uaddr"):
            return self._ram + PAGE * rng.randrange(64) if rng.random() < 0.9 else self._scratch
        if name in ("memory_size", "size", "len", "guest_len", "length"):
            return PAGE * rng.choice((0, 1, 1, 2, 16, 64))
        if name in ("guest_phys_addr", "gpa", "address", "guest_memfd_offset"):
            return PAGE * rng.choice((0, 0, 1, 2, 16, 240, 255, 256))
        if name in ("fd", "guest_memfd", "sev_fd"):
            fds = self._fds()
            return rng.choice(fds) if fds else -1
        if name.startswith(("pad", "reserved")):
            return 0
        special = _SPECIAL.get(name)
        return rng.choice(special) if special is not None else rng.choice((0, 0, 1, 2, 3, 8, 0xFF, 0x1000, self.number()))


_SPECIAL: dict[str, tuple[int, ...]] = {
    "slot": (0, 0, 1, 1, 2, 3, 32763, 32764), "flags": (0, 0, 0, 1, 2, 4, 3), "attributes": (0, 8, 8, 1),
    "rip": (0, 0x1000, 0x1000, 0xFFF0), "rsp": (0x1000, 0x2000), "rflags": (2, 2, 0x202, 0x102),
    "cr0": (0x10, 0x11, 0x60000010, 0x80000011, 0x80010033), "cr3": (0, 0x1000, 0x2000), "cr4": (0, 0x20, 0x620, 0x600),
    "efer": (0, 0, 0x500, 0xD01), "apic_base": (0xFEE00900,), "cr8": (0, 0, 15), "base": (0, 0, 0x1000, 0xFFFF0000),
    "limit": (0xFFFF, 0xFFFFFFFF), "present": (1, 1, 1, 0), "unusable": (0, 0, 0, 1), "s": (1, 1, 0), "type": (3, 11, 2), "l": (0, 0, 1),
    "cap": (9, 112, 150, 168, 188, 201, 233), "mxcsr": (0x1F80, 0), "fcw": (0x37F,), "policy": (0, 1, 4), "nr_xcrs": (0, 1, 1, 16),
    "mp_state": (0, 0, 1), "control": (0, 1, 3, 0x10001, 0x20001), "dr7": (0, 0x400, 0x401), "error": (0,),
}  # fmt: skip
