"""The vault: where the firmware's keys rest, and the few places where plaintext of a command may stand.

A key lives in secret memory (mem/arena.py): no core dump, no ptrace, no /proc/PID/mem shows it, and while no command
and no vCPU needs one, a load from there faults even in this process. Python objects hold *views* of it, never the
bytes: a repr or a pickle has nothing to tell. What a library hands back as bytes on its way in or out is overwritten
(`kvmapi.wiping`) before it is dropped, because freed heap memory keeps its contents.

    with vault.opened():            # nests; any thread
        tik.view                    # the 16 bytes, here and only here

One vault belongs to one platform. It is bounded: a platform has at most as many guests as ASIDs, and a full vault is
the firmware's RESOURCE_LIMIT.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from kvmapi.abi import psp
from kvmapi.model.mem.arena import PAGE, SecretRegion
from kvmapi.model.mem.cipher import ROOM, Workspace
from kvmapi.model.sev.status import FirmwareError

_SIZE = 64 * 1024
_GRAIN = 16
_getrandom = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)(("getrandom", ctypes.CDLL(None)))
_vaults: WeakSet[Vault] = WeakSet()


def _forked() -> None:
    for vault in list(_vaults):
        vault.forked()


os.register_at_fork(after_in_child=_forked)


class Secret:
    """`size` bytes in a vault, zero at first."""

    __slots__ = ("_room", "_vault", "size", "view")

    def __init__(self, vault: Vault, room: memoryview, size: int) -> None:
        self._vault = vault
        self._room: memoryview | None = room
        self.view = room[:size]
        self.size = size

    def __repr__(self) -> str:
        return f"Secret({self.size} bytes, never shown)"

    def __reduce__(self) -> str:
        raise TypeError("a secret never leaves the model's firmware")

    def fill_random(self) -> None:
        """Draw it, straight from the kernel into its place."""
        with self._vault.opened():
            if _getrandom(ctypes.addressof(ctypes.c_char.from_buffer(self.view)), self.size, 0) != self.size:
                raise FirmwareError(psp.SEV_RET_HWSEV_RET_PLATFORM)

    def set(self, data: bytes | bytearray | memoryview) -> None:
        """Take a value of the same length; the caller wipes its own copy."""
        with self._vault.opened():
            self.view[:] = data

    def release(self) -> None:
        """Wipe it and give the room back. Safe to call twice."""
        room, self._room = self._room, None
        if room is not None:
            with self._vault.opened():
                room[:] = bytes(len(room))
            self._vault.take_back(room)
            self.view, self.size = memoryview(b""), 0


class Vault:
    """Secret memory of one platform's firmware: a region of keys, and room for the plaintext of one command, each with a door."""

    def __init__(self) -> None:
        self._region = SecretRegion(_SIZE)
        self._lock = threading.Lock()
        self._depth = 0
        self._top = 0
        self._free: dict[int, list[memoryview]] = {}
        self._room = SecretRegion(-(-ROOM // PAGE) * PAGE)
        self._work = Workspace(self._room.view[:ROOM])
        self._busy = threading.Lock()
        _vaults.add(self)

    def forked(self) -> None:
        """The process is a child now, and the keys are its parent's: what stands here is zero, and nobody is inside."""
        self._lock, self._busy, self._depth = threading.Lock(), threading.Lock(), 0

    @property
    def secret(self) -> bool:
        """Whether the kernel gave secret memory (memfd_secret), and not ordinary memory outside core dumps."""
        return self._region.secret and self._room.secret

    def opened(self) -> Vault:
        """A context in which views of this vault can be used."""
        return self

    def __enter__(self) -> Vault:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._region.open_door()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._region.close_door()

    @contextmanager
    def working(self) -> Iterator[Workspace]:
        """A context with the vault open and room for one command's plaintext in passing, wiped at the end; one at a time."""
        with self._busy, self:
            self._room.open_door()
            try:
                yield self._work
            finally:
                self._work.hidden[:] = bytes(ROOM)  # a part of a unit brings back what was decrypted before it
                self._room.close_door()

    def hold(self, size: int) -> Secret:
        """Room for a secret of `size` bytes; RESOURCE_LIMIT when there is none left."""
        room = -(-size // _GRAIN) * _GRAIN
        with self._lock:
            free = self._free.get(room)
            if free:
                return Secret(self, free.pop(), size)
            if self._top + room > _SIZE:
                raise FirmwareError(psp.SEV_RET_RESOURCE_LIMIT)
            self._top += room
            return Secret(self, self._region.view[self._top - room : self._top], size)

    def take_back(self, room: memoryview) -> None:
        """What `hold` gave out, wiped; only `Secret.release` calls this."""
        with self._lock:
            self._free.setdefault(len(room), []).append(room)
