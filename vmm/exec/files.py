"""Which of the model's files stands behind an fd of a traced program.

An fd that we give is a memfd (kvmapi.model.placeholder.StandIn), opened anew and put into the program's table. What it
is, is told by its inode: duplicates, copies in a forked child and fds sent over a socket need no bookkeeping. When the
last of them is closed, and the last mapping is gone, inotify says so: that is the moment at which the kernel would
release its file. Such news is taken in before each call that could depend on it.

A process that closes a fd has queued the news when close returns, so whoever asks next sees it. If there is more news than
the kernel keeps, it says so, and lost.py looks for what is still open.

Locks: `_releasing` while news is taken in, so that whoever asks waits for what others have read; `_installing` while an fd
is on its way to a program; `_lock` guards the tables, and nothing waits under it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmapi.abi import kvm
from kvmapi.model.caller import Errno
from kvmapi.model.files import File
from kvmapi.model.guest_memfd import GuestMemfdFile
from kvmapi.model.vcpu import VcpuFile
from vmm.exec import lost
from vmm.exec.lost import Key

if TYPE_CHECKING:
    from kvmapi.model.placeholder import StandIn
    from vmm.exec.caller import Call, Process
    from vmm.exec.notify import Listener

_IN_CLOSE, _IN_OVERFLOW = 0x8 | 0x10, 0x4000
_EVENT = struct.Struct("<iIII")
_NEWS = 64 << 10  # bytes read at once
_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


@dataclass(slots=True)
class Entry:
    """A file that some traced process has open. `owner`: the process that made it, whose memory it uses. `run`: of a vCPU,
    the call that ran it last.
    """

    file: File
    owner: Process
    guarded: bool
    is_vcpu: bool
    run: Call | None = None


class FileTable:
    """All of them. `first_guarded`: from this number on the filter asks us about reads, writes and fstat. `released`: hears of each
    file that nobody has any more.
    """

    def __init__(self, first_guarded: int, memlock: bool = False, released: Callable[[File], None] | None = None) -> None:
        self.memlock = memlock
        self._released = released
        self.say: Callable[[str], None] = lambda words: None  # told once to the user
        self._first_guarded = first_guarded
        self._entries: dict[Key, Entry] = {}
        self._watches: dict[int, Key] = {}
        self._lock = threading.Lock()
        self._releasing = threading.Lock()
        self._installing = threading.Lock()
        self.news = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.news < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def __len__(self) -> int:
        return len(self._entries)

    def look_up(self, tgid: int, tid: int, fd: int) -> Entry | None:
        """What stands behind `fd` of a thread; None: nothing of ours. Errno(EBADF): nothing is open there. ProcessLookupError:
        the thread is not of that process.
        """
        try:
            status = os.stat(f"/proc/{tgid}/task/{tid}/fd/{fd}")
        except OSError as failure:
            if not os.path.exists(f"/proc/{tgid}/task/{tid}"):
                raise ProcessLookupError from None
            raise Errno(errno.EBADF if failure.errno == errno.ENOENT else failure.errno or errno.EBADF) from None
        return self._entries.get((status.st_dev, status.st_ino))

    def by_inode(self, device: int, inode: int) -> Entry | None:
        """The same, for a mapping."""
        return self._entries.get((device, inode))

    def install(self, listener: Listener, call: Call, file: File) -> int:
        """A new fd of the caller for `file`: the number. The caller's fds are the file's first holder. Raises Errno."""
        try:
            stand_in = file.stand_in()
        except OSError as failure:
            file.release()
            raise Errno(failure.errno or errno.EMFILE) from None
        with self._installing:  # two threads of a program must not find the same number free
            return self._installed(listener, call, file, stand_in)

    def _installed(self, listener: Listener, call: Call, file: File, stand_in: StandIn) -> int:
        try:
            ours = os.open(f"/proc/self/fd/{stand_in.fd}", (stand_in.access if call.access is None else call.access) | os.O_CLOEXEC)
        except OSError as failure:
            file.fd_closed()
            raise Errno(failure.errno or errno.EMFILE) from None
        finally:
            os.close(stand_in.fd)
        key: Key | None = None
        try:
            status = os.fstat(ours)
            key = status.st_dev, status.st_ino
            watch = int(_libc.inotify_add_watch(self.news, b"/proc/self/fd/%d" % ours, _IN_CLOSE))
            if watch < 0:
                number = ctypes.get_errno()
                if number == errno.ENOSPC:
                    self.say("no file of a VM can be watched any more: raise sysctl fs.inotify.max_user_watches")
                raise OSError(number, "inotify")
            with self._lock:
                self._entries[key] = Entry(file, call.process, stand_in.guarded, isinstance(file, VcpuFile))
                self._watches[watch] = key
            return self._added(listener, call, ours, stand_in.guarded, call.close_on_exec and not isinstance(file, GuestMemfdFile))
        except OSError as failure:
            with self._lock:
                if key is not None:
                    self._entries.pop(key, None)
            file.fd_closed()
            raise Errno(failure.errno or errno.EMFILE) from None
        finally:
            os.close(ours)

    def _added(self, listener: Listener, call: Call, fd: int, guarded: bool, close_on_exec: bool) -> int:
        """Put it into the caller's table: the number, which is a guarded one if need be and if it may have any. Raises OSError."""
        if guarded:
            try:
                return listener.add_fd(call.id, fd, close_on_exec=close_on_exec, at=self._free_number(call))
            except OSError as failure:
                if failure.errno != errno.EBADF:  # beyond its RLIMIT_NOFILE
                    raise
        return listener.add_fd(call.id, fd, close_on_exec=close_on_exec)

    def _free_number(self, call: Call) -> int:
        """The lowest free number of those that the filter guards."""
        taken = {int(name) for name in os.listdir(f"/proc/{call.process.tgid}/task/{call.thread}/fd")}
        at = self._first_guarded
        while at in taken:
            at += 1
        return at

    def take_news(self) -> None:
        """Release every file whose last fd was closed by now."""
        with self._releasing:
            complete = True
            while data := self._read():
                complete = self._release(data) and complete
            if not complete:
                self._release_lost()

    def _read(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(self.news, _NEWS)
        return b""

    def _release(self, data: bytes) -> bool:
        """Those that the news is about. False: there was more news than was kept."""
        at, complete = 0, True
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            complete = complete and not mask & _IN_OVERFLOW
            self._release_one(watch)
        return complete

    def _release_one(self, watch: int) -> None:
        with self._lock:
            key = self._watches.pop(watch, None)
            entry = self._entries.pop(key, None) if key is not None else None
        if key is not None:
            _libc.inotify_rm_watch(self.news, watch)
        if entry is not None:
            if self._released is not None:
                self._released(entry.file)
            with contextlib.suppress(OSError):  # the rest must go, too
                entry.file.fd_closed()

    def _release_lost(self) -> None:
        """Those that nobody has any more, by looking for them."""
        with self._installing:
            existing = lost.watched(self.news)
            with self._lock:
                gone = [watch for watch in self._watches if watch not in existing]
                kept = {watch: key for watch, key in self._watches.items() if watch in existing and _has_it(self._entries.get(key))}
            used = lost.used(kept.values()) if kept else set()
        for watch in (*gone, *(watch for watch, key in kept.items() if key not in used)):
            self._release_one(watch)

    def close(self) -> None:
        """Nobody is left: release everything."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), {}
            self._watches.clear()
        for entry in entries:
            if self._released is not None:
                self._released(entry.file)
            entry.file.fd_closed()
        os.close(self.news)


def _has_it(entry: Entry | None) -> bool:
    """Does the model itself have the memfd that the program has?"""
    if entry is None or entry.is_vcpu:
        return entry is not None
    return isinstance(entry.file, GuestMemfdFile) and bool(entry.file.flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED)
