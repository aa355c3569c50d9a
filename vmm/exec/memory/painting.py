"""Our views of a process's memory, kept as it has it mapped: files in place, mirrors of what cannot be shared.

A view is painted a mapping at a time, and what was painted is remembered, until something says that it may not be so any
more: a change of the process's mappings (`forget`), or a file that was cut, for which our own fault handler has painted
over the view (sigbus.py). What may not be shared with us is mirrored (mirror.py). All of it is under Ram's lock.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from kvmapi.model.caller import PAGE, USER_TOP
from vmm.exec.memory import backing as backings
from vmm.exec.memory import sigbus, views
from vmm.exec.memory.maps import Area, Maps
from vmm.exec.memory.mirror import Mirror

_CHECKED = 64


class Painting:
    """The views of the process `tgid`. `use(start, end, area)` is told what guests may use from now on."""

    def __init__(self, tgid: int, maps: Maps, use: Callable[[int, int, Area | None], None]) -> None:
        self._tgid = tgid
        self._maps = maps
        self._use = use
        self._views: list[views.View] = []
        self.mirror = Mirror(tgid, self._mirrored)
        self._checked: deque[tuple[int, int]] = deque(maxlen=_CHECKED)  # ranges whose paint is known to be right
        self._hidden: set[tuple[int, int]] = set()  # files that there is no way to
        self._rescues = 0

    def view(self, start: int, end: int) -> views.View:
        """The view that covers [start, end), whatever is painted there; made if there is none. Raises OSError."""
        for view in self._views:
            if view.covers(start, end):
                return view
        made = views.View(start, end)
        self._views.append(made)
        self._checked.clear()  # what other views show of it
        return made

    def bring_up_to_date(self, start: int, end: int) -> None:
        """The views show [start, end) as the process has it. Raises OSError."""
        self._look_for_rescues()
        if not any(first <= start and end <= last for first, last in self._checked):
            self.repaint(start, end)

    def paint(self, area: Area) -> None:
        """The same for one mapping. Raises OSError."""
        self._look_for_rescues()
        self._paint(area.start, area.end, area)
        self._use(area.start, area.end, area)

    def forget(self) -> None:
        """The process's mappings may have changed."""
        self._checked.clear()
        self._hidden.clear()

    def start_afresh(self) -> None:
        """The process has another program: nothing is what it was."""
        self._checked.clear()
        self.mirror.drop(0, USER_TOP)
        for view in self._views:
            view.blank()

    def strip(self, files: Iterable[tuple[int, int]]) -> None:
        """These files are about to go."""
        for view in self._views:
            for key in files:
                view.strip(*key)

    def close(self) -> list[views.View]:
        """Nothing is shown any more; the views, for `views.bury`."""
        gone, self._views = self._views, []
        self._checked.clear()
        for view in gone:
            with contextlib.suppress(OSError):
                view.blank()
        return gone

    def _look_for_rescues(self) -> None:
        """Was anything painted over since the last time?"""
        rescues = sigbus.rescues()
        if rescues != self._rescues:
            self._rescues = rescues
            self._checked.clear()
            for view in self._views:
                view.doubt()

    def repaint(self, start: int, end: int) -> None:
        """Bring the views of [start, end) up to date with what the process has mapped there: whole mappings, so that the
        next question finds them done.
        """
        at = start
        while at < end:
            area = self._maps.next(at)
            if area is None or area.start > at:
                until = min(area.start if area is not None else end, end)
                self._paint(at, until, None)
                self._use(at, until, None)
            else:
                start, until = min(start, area.start), area.end
                self._use(area.start, area.end, area)
                self._paint(area.start, area.end, area)
            at = until
        self._checked.append((start, at))

    def _paint(self, start: int, end: int, area: Area | None) -> None:
        """[start, end), a part of `area`, in every view that has some of it. Raises OSError."""
        paint = views.NOTHING
        if area is not None and not area.special:
            there = area.shared and (area.device, area.inode) not in self._hidden
            paint = views.Paint(area.device, area.inode, area.offset - area.start) if there else views.MIRROR
        for view in self._views:
            first, last = max(start, view.start), min(end, view.end)
            if first < last and not view.is_painted(first, last, paint):
                if area is not None and paint not in (views.NOTHING, views.MIRROR):
                    paint = self._paint_file(view, first, last, paint, area)
                else:
                    view.paint(first, last, paint)
                if paint == views.MIRROR:
                    self.mirror.fill(first, last, view.pointer(first))

    def _paint_file(self, view: views.View, first: int, last: int, paint: views.Paint, area: Area) -> views.Paint:
        """The file of a shared mapping, or a mirror where there is no way to it. Raises OSError."""
        known = backings.find(area.device, area.inode)
        if known is not None:
            with known.kept():
                view.paint(first, last, paint, known.fd)
            return paint
        found = backings.file_of(self._tgid, area.device, area.inode, area.start, area.end, area.name)
        if found is not None:
            fd, writable = found
            try:
                for attempt in (writable, False):
                    with contextlib.suppress(PermissionError):  # sealed against writing
                        view.paint(first, last, paint, fd, attempt)
                        return paint
            finally:
                os.close(fd)
        self._hidden.add((area.device, area.inode))
        view.paint(first, last, views.MIRROR)
        return views.MIRROR

    def _mirrored(self, address: int) -> Iterator[int]:
        for view in self._views:
            if view.covers(address, address + PAGE) and view.paint_at(address)[0] == views.MIRROR:
                yield view.pointer(address)
