"""The pieces of guest RAM one by one, on this process and on children of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading

import pytest

from kvmapi.model.caller import PAGE, Errno
from vmm.exec.memory import backing, copying, views
from vmm.exec.memory.maps import Area, Maps, cut
from vmm.exec.memory.mirror import Mirror
from vmm.exec.memory.ram import Ram
from vmm.exec.memory.views import GRAIN, MIRROR, NOTHING, Paint, View
from vmm.exec.memory.watch import Watch


def private(pages: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


# ---- maps
@pytest.mark.parametrize("query", [True, False])
def test_what_is_mapped(query: bool) -> None:
    maps = Maps(os.getpid(), query=query)
    shared = mmap.mmap(-1, 4 * PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    area = maps.area(at)
    assert area is not None and area.start <= at and at + 4 * PAGE <= area.end
    assert (area.shared, area.prot) == (True, 3) and area.inode != 0
    assert maps.area(0) is None
    assert maps.walk(at + PAGE, at + 2 * PAGE) == [
        area._replace(start=at + PAGE, end=at + 2 * PAGE, offset=area.offset + at + PAGE - area.start)
    ]
    maps.close()


def test_both_ways_to_ask_say_the_same() -> None:
    asked, read = Maps(os.getpid()), Maps(os.getpid(), query=False)
    at, seen = 0, []
    while (area := read.next(at)) is not None:
        seen.append(area)
        at = area.end
    assert len(seen) > 10
    stable = [area for area in seen if area.name.startswith(b"/")]
    for area in stable:
        found = asked.area(area.start)
        assert found is not None and found[:6] == area[:6] and found.inode == area.inode
    asked.close()
    read.close()


def test_maps_of_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        maps = Maps(process.pid)
    assert maps.walk(0, 1 << 47) == []


# ---- copying
def test_only_pages_with_contents_are_copied() -> None:
    memory, at = private(64)
    for page in (0, 1, 2, 10, 63):
        memory[page * PAGE] = page + 1
    assert memory[20 * PAGE] == 0  # the zero page
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        wanted = [(at, at + 3 * PAGE), (at + 10 * PAGE, at + 11 * PAGE), (at + 63 * PAGE, at + 64 * PAGE)]
        assert list(copying.present(pagemap.fileno(), at, at + 64 * PAGE)) == wanted
        read = list(copying.entries(pagemap.fileno(), at, at + 64 * PAGE))
        assert [run for run in read if run != (at + 20 * PAGE, at + 21 * PAGE)] == wanted
    target = mmap.mmap(-1, 64 * PAGE)
    view = ctypes.addressof(ctypes.c_char.from_buffer(target)) - at
    copying.copy(os.getpid(), at, at + 64 * PAGE, view, False)
    assert target[:] == memory[:]


def test_protected_pages_are_copied_too() -> None:
    memory, at = private(4)
    memory[:] = bytes(range(256)) * (4 * PAGE // 256)
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + PAGE), ctypes.c_size_t(PAGE), 0)
    target = mmap.mmap(-1, 4 * PAGE)
    copying.copy(os.getpid(), at, at + 4 * PAGE, ctypes.addressof(ctypes.c_char.from_buffer(target)) - at, False)
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + PAGE), ctypes.c_size_t(PAGE), 3)
    assert target[:] == memory[:]


# ---- backings
def test_a_backing_dies_with_its_last_user() -> None:
    made = backing.new(0, GRAIN)
    made.take(0, PAGE)
    assert not made.serves(0, PAGE) and made.serves(PAGE, 2 * PAGE) and not made.serves(PAGE, 2 * GRAIN)
    theirs = made.another()
    with mmap.mmap(theirs, PAGE):
        os.close(theirs)
        assert made not in backing.reap() and backing.find(*made.key) is made
    assert made in backing.reap() and backing.find(*made.key) is None


def test_small_neighbours_share_a_backing() -> None:
    made = backing.new(16 * PAGE, 20 * PAGE)
    assert made.join(12 * PAGE, 16 * PAGE) and made.join(20 * PAGE, 21 * PAGE)
    assert not made.join(22 * PAGE, 23 * PAGE), "there is a gap"
    assert not made.join(21 * PAGE, 21 * PAGE + backing.TOGETHER), "much memory would stay until the last of it is gone"
    made.take(16 * PAGE, 18 * PAGE)
    made.take(18 * PAGE, 19 * PAGE)
    assert [made.conversions(page * PAGE) for page in (12, 15, 16, 19, 20)] == [0, 0, 2, 2, 0]
    made.take(12 * PAGE, 16 * PAGE)
    assert not made.serves(12 * PAGE, 13 * PAGE) and not made.serves(18 * PAGE, 20 * PAGE) and made.serves(19 * PAGE, 21 * PAGE)
    made.close()


def test_nobody_can_cut_a_backing() -> None:
    made = backing.new(0, GRAIN)
    theirs = made.another()
    with pytest.raises(PermissionError):
        os.ftruncate(theirs, PAGE)
    os.close(theirs)
    made.close()


# ---- views
def test_paint_is_known() -> None:
    view = View(5 * GRAIN + PAGE, 5 * GRAIN + 2 * PAGE)
    start = view.start
    assert (start, view.end) == (5 * GRAIN, 6 * GRAIN)
    view.paint(start + PAGE, start + 4 * PAGE, MIRROR)
    assert view.paint_at(start) == (NOTHING, start + PAGE)
    assert view.is_painted(start + PAGE, start + 4 * PAGE, MIRROR) and not view.is_painted(start, start + 2 * PAGE, MIRROR)
    view.paint(start + 2 * PAGE, start + 3 * PAGE, NOTHING)
    assert view.paint_at(start + PAGE) == (MIRROR, start + 2 * PAGE) and view.paint_at(start + 3 * PAGE) == (MIRROR, start + 4 * PAGE)
    view.paint(start + 2 * PAGE, start + 3 * PAGE, MIRROR)
    assert view.paint_at(start + PAGE) == (MIRROR, start + 4 * PAGE)
    view.paint(start, view.end, NOTHING)
    assert view.paint_at(start) == (NOTHING, view.end)
    view.close()


def test_a_file_stands_where_it_is_painted() -> None:
    fd = os.memfd_create("test")
    os.pwrite(fd, b"there", 3 * PAGE)
    view = View(0, GRAIN)
    view.paint(8 * PAGE, 9 * PAGE, Paint(1, 2, -5 * PAGE), fd)
    assert ctypes.string_at(view.pointer(8 * PAGE), 5) == b"there"
    view.strip(1, 2)
    assert view.paint_at(0) == (NOTHING, GRAIN)
    view.close()
    os.close(fd)


# ---- the guard
GUARD = """
import ctypes, os, signal, sys
from vmm.exec.memory import sigbus
from vmm.exec.memory.views import GRAIN, Paint, View
fd = os.memfd_create("test")
os.ftruncate(fd, 1 << 20)
view = View(0, GRAIN)
view.paint(0, 1 << 20, Paint(1, 2, 0), fd)
at = view.pointer(0)
ctypes.memset(at, 7, 1 << 20)
os.ftruncate(fd, 4096)
assert ctypes.string_at(at + 8192, 1) == b"\\0", "past the end"  # SIGBUS
ctypes.memset(at + 12288, 5, 10)
assert ctypes.string_at(at, 1) == b"\\7" and ctypes.string_at(at + 12288, 2) == b"\\5\\5"
assert ctypes.string_at(at + (2 << 20), 1) == b"\\0", "nothing is painted there"  # SIGSEGV
assert sigbus.rescues() == 3, sigbus.rescues()
for page in range(0, 64 << 20, 4096):
    ctypes.string_at(at + (512 << 20) + 2 * page, 1)  # more than a process may have mappings, if each made two
assert sigbus.FINE < sigbus.rescues() < 3 * sigbus.FINE, sigbus.rescues()
print("rescued", flush=True)
if sys.argv[1] == "closed":
    view.close()
    ctypes.string_at(at, 1)
elif sys.argv[1] == "elsewhere":
    ctypes.string_at(8, 1)
"""


@pytest.mark.parametrize(("then", "status"), [("nothing", 0), ("elsewhere", -signal.SIGSEGV), ("closed", -signal.SIGSEGV)])
def test_accesses_to_ram_that_is_not_there(then: str, status: int) -> None:
    """They find zeros; any other wild access ends the process as ever."""
    done = subprocess.run([sys.executable, "-c", GUARD, then], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (status, "rescued\n"), done.stderr


# ---- the mirror
def test_the_mirror_writes_back_what_the_guest_changed_and_nothing_else() -> None:
    theirs, their_address = private(1)
    ours, our_address = private(1)
    theirs[:5] = b"hello"
    mirror = Mirror(os.getpid(), lambda address: [our_address])
    assert mirror.add(their_address) and ours[:5] == b"hello"
    ours[100:103] = b"abc"  # the guest
    theirs[101:105] = b"WXYZ"  # the process, meanwhile
    theirs[:5] = b"HELLO"
    mirror.leave()
    assert theirs[:5] == b"HELLO" and theirs[99:106] == b"\0abcYZ\0"
    mirror.enter()
    assert ours[:5] == b"HELLO" and ours[99:106] == b"\0abcYZ\0"
    mirror.drop(their_address, their_address + PAGE)
    assert len(mirror) == 0


def test_the_mirror_of_what_is_not_there() -> None:
    mirror = Mirror(os.getpid(), lambda address: [])
    assert not mirror.add(0) and len(mirror) == 0


def test_special_mappings() -> None:
    assert Area(0, PAGE, 1, False, 0, 0, 0, PAGE, b"[vvar]").special
    assert not Area(0, PAGE, 1, False, 0, 0, 0, PAGE, b"[heap]").special
    assert views.UNKNOWN not in (NOTHING, MIRROR)


def test_ram_of_a_process_that_has_ended() -> None:
    """A vCPU that still runs finds zeros; nobody finds anything new."""
    shared = mmap.mmap(-1, 4 * PAGE)
    shared[:3] = b"abc"
    at = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    ram = Ram(os.getpid())
    assert ram.accessible(at, write=True)
    pointer = ram.pointer(at, 4 * PAGE)
    assert ctypes.string_at(pointer, 3) == b"abc"
    ram.close()
    assert ctypes.string_at(pointer, 3) == bytes(3)
    ctypes.memset(pointer, 1, PAGE)
    assert not ram.accessible(at, write=True) and not ram.pinnable(at, PAGE, False, False) and not ram.convertible(at, PAGE)
    with pytest.raises(Errno):
        ram.pointer(at, PAGE)
    assert shared[:3] == b"abc"


# ---- watching
def test_a_mapping_that_has_grown_is_no_change() -> None:
    memory = mmap.mmap(-1, 4 * PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    maps, gone = Maps(os.getpid()), []
    watch = Watch(maps, threading.RLock(), gone.extend)
    whole = maps.area(at)
    assert whole is not None
    watch.use(at + PAGE, at + 3 * PAGE, cut(whole, at + PAGE, at + 3 * PAGE))
    assert not watch.look() and gone == []
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + 2 * PAGE), ctypes.c_size_t(PAGE), 1)
    assert watch.look() and gone == [(at + PAGE, at + 3 * PAGE)]
    maps.close()


class Killed:
    """A call whose process is killed as soon as it is given something."""

    busy: tuple[int, ...] = ()
    ip = 0

    def __init__(self, pid: int) -> None:
        self.tid = pid
        self.answers: list[int] = []

    def add_fd(self, fd: int) -> int:
        os.kill(self.tid, signal.SIGKILL)
        os.waitid(os.P_PID, self.tid, os.WEXITED | os.WNOWAIT)
        raise OSError(errno.ENOENT, "nobody waits")

    def answer(self, result: int) -> bool:
        self.answers.append(result)
        return False


@pytest.mark.parametrize("first", ["the conversion", "the process"])
def test_a_process_killed_while_its_memory_becomes_shared(first: str) -> None:
    """What was made for it is given back, whichever is noticed first; and no word about memory that cannot be shared."""
    memory, at = private(4)
    before = len(backing._all)
    if (pid := os.fork()) == 0:
        signal.pause()
        os._exit(0)
    try:
        ram, held = Ram(pid), Killed(pid)

        def action() -> int:
            assert len(backing._all) == before + 1
            if first == "the process":
                ram.close()
            return 5

        ram.convert(held, at, 4 * PAGE, action)
        if first == "the conversion":
            ram.close()
        assert (held.answers, ram.failure) == ([5], None)
        assert len(backing._all) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        memory.close()


def test_a_backing_that_another_process_has_closed() -> None:
    """It serves nobody any more: its fd's number may be somebody else's by then."""
    one = backing.new(1 << 20, 1 << 21)
    one.take(1 << 20, (1 << 20) + PAGE)
    assert one.keep() and backing.reap() == []
    one.let_go()
    assert backing.reap() == [one] and backing.find(*one.key) is None
    assert not one.keep()
    with pytest.raises(OSError, match="Bad file"), one.kept():
        raise AssertionError("its fd could be used")
    one.close()
