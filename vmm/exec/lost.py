"""Which files are still open when the kernel has dropped news of closed ones.

inotify keeps 16384 events (fs.inotify.max_queued_events); of those that come then it says only that there were some. So
what is open now is asked for. A memfd that nobody has is gone with its watch: the list of watches tells. A memfd that the
model has itself stays, and is looked for among the fds and mappings of all processes that may be looked into: one that
is on its way through a socket just then is taken for closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection

Key = tuple[int, int]  # device and inode


def watched(news: int) -> set[int]:
    """The watches of the inotify fd `news` whose files exist. Raises OSError."""
    with open(f"/proc/self/fdinfo/{news}", encoding="ascii") as lines:
        return {int(line.split()[1].partition(":")[2], 16) for line in lines if line.startswith("inotify wd:")}


def used(keys: Collection[Key]) -> set[Key]:
    """Those of the files that a process other than this one has open or mapped."""
    found: set[Key] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) != os.getpid():
            with contextlib.suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):  # each may have fds of its own
                    found |= _opened(f"/proc/{pid}/task/{task}/fd")
            with contextlib.suppress(OSError):
                found |= _mapped(pid)
    return found & set(keys)


def _opened(folder: str) -> set[Key]:
    found = set()
    for fd in os.listdir(folder):
        with contextlib.suppress(OSError):
            if os.readlink(f"{folder}/{fd}").startswith("/memfd:"):
                status = os.stat(f"{folder}/{fd}")
                found.add((status.st_dev, status.st_ino))
    return found


def _mapped(pid: str) -> set[Key]:
    found = set()
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            _, _, _, device, inode, *name = line.split(None, 5)
            if name and name[0].startswith("/memfd:"):
                major, _, minor = device.partition(":")
                found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found
