"""KVM's allocator of ASIDs: the address space identifiers that tell the memory controller which guest's key to use.

SEV-ES guests have the ASIDs from 1 to `min_sev_asid` - 1, SEV guests the rest. An ASID that a guest gave back is not
free at once: caches may hold data under it. It waits until its range is used up; then all that wait, of both ranges,
are flushed and free together. So ASIDs are handed out upwards, and each comes around as late as possible. Source:
sev_asid_new, sev_asid_free, __sev_recycle_asids (arch/x86/kvm/svm/sev.c, 7.3).
"""

from __future__ import annotations

import errno
import os
import threading
from weakref import WeakKeyDictionary

from kvmapi.model.caller import Errno
from kvmapi.model.platform import Platform


class AsidPool:
    """The ASIDs of one machine."""

    def __init__(self, highest: int, min_sev_asid: int) -> None:
        self._ranges = {False: range(min_sev_asid, highest + 1), True: range(1, min_sev_asid)}
        self._taken: set[int] = set()
        self._returned: set[int] = set()  # taken still, until they are flushed
        self._lock = threading.Lock()

    def take(self, *, es: bool) -> int:
        """An ASID for an SEV-ES guest or an SEV guest: ENOTTY where this kind has no ASIDs, EBUSY when all are in use."""
        mine = self._ranges[es]
        if not mine:
            raise Errno(errno.ENOTTY)
        with self._lock:
            if self._taken.issuperset(mine) and not self._returned.isdisjoint(mine):
                self._taken -= self._returned
                self._returned.clear()
            for asid in mine:
                if asid not in self._taken:
                    self._taken.add(asid)
                    return asid
        raise Errno(errno.EBUSY)

    def give(self, asid: int) -> None:
        """The guest that had it is gone."""
        with self._lock:
            self._returned.add(asid)


_pools: WeakKeyDictionary[Platform, AsidPool] = WeakKeyDictionary()
_pools_lock = threading.Lock()
os.register_at_fork(after_in_child=_pools_lock._at_fork_reinit)  # type: ignore[attr-defined]


def pool_of(platform: Platform) -> AsidPool:
    """The pool of this machine: one, whoever asks first."""
    with _pools_lock:
        pool = _pools.get(platform)
        if pool is None:
            pool = _pools[platform] = AsidPool(platform.asids, platform.min_sev_asid)
        return pool
