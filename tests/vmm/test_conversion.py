"""The conversion transaction: all of it or nothing, one at a time, and a record that does not grow."""

import errno
import threading

import pytest

from vmm.checks import GpaRange
from vmm.conversion import EXPLICIT, IMPLICIT, ConversionFailed, Converter, Step
from vmm.gpamap import GpaMap

PAGE = 0x1000
RANGE = GpaRange(2 * PAGE, 3 * PAGE)


class Recorder:
    """A backing of three steps that writes down what happens and fails where it is told to."""

    def __init__(self, fails: str = "", with_what: BaseException | None = None) -> None:
        self.events: list[str] = []
        self.fails = fails
        self.with_what = with_what or OSError(errno.ENOSPC, "full")
        self.undo_fails = False

    def steps(self, range: GpaRange, private: bool, before: GpaMap) -> list[Step]:
        return [Step(name, lambda name=name: self._do(name), lambda name=name: self._undo(name)) for name in ("a", "b", "c")]

    def _do(self, name: str) -> None:
        if name == self.fails:
            raise self.with_what
        self.events.append(f"do {name}")

    def _undo(self, name: str) -> None:
        self.events.append(f"undo {name}")
        if self.undo_fails:
            raise OSError(errno.EIO, "cannot")


@pytest.fixture
def gpamap() -> GpaMap:
    m = GpaMap()
    m.add_slot(0, 0, 16 * PAGE)
    return m


def test_a_conversion_does_its_steps_then_the_map_then_the_record(gpamap: GpaMap) -> None:
    backing = Recorder()
    converter = Converter(gpamap, backing)
    done = converter.convert(RANGE, True, EXPLICIT, vcpu=3)
    assert backing.events == ["do a", "do b", "do c"]
    assert done.to_json() == {"gpa": 2 * PAGE, "size": 3 * PAGE, "to": "private", "cause": "explicit", "vcpu": 3}
    assert [r.state for r in gpamap.ranges()] == ["shared", "private", "shared"]
    assert converter.snapshot() == ([done], 1)
    assert converter.pending is None


@pytest.mark.parametrize(("fails", "events"), [("a", []), ("b", ["do a", "undo a"]), ("c", ["do a", "do b", "undo b", "undo a"])])
def test_when_a_step_fails_everything_is_as_before(gpamap: GpaMap, fails: str, events: list[str]) -> None:
    backing = Recorder(fails)
    converter = Converter(gpamap, backing)
    with pytest.raises(ConversionFailed, match=f"^{fails}: ") as caught:
        converter.convert(RANGE, True, EXPLICIT, 0)
    assert caught.value.code == -errno.ENOSPC
    assert backing.events == events
    assert gpamap.private_pages() == 0
    assert converter.snapshot() == ([], 0)
    assert converter.pending is None


def test_an_interrupt_in_a_step_undoes_too_and_passes_through(gpamap: GpaMap) -> None:
    backing = Recorder("b", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        Converter(gpamap, backing).convert(RANGE, True, EXPLICIT, 0)
    assert backing.events == ["do a", "undo a"]


def test_an_undo_that_fails_does_not_keep_the_others_from_it(gpamap: GpaMap) -> None:
    backing = Recorder("c")
    backing.undo_fails = True
    with pytest.raises(ExceptionGroup):
        Converter(gpamap, backing).convert(RANGE, True, EXPLICIT, 0)
    assert backing.events == ["do a", "do b", "undo b", "undo a"]


def test_a_storm_of_conversions_keeps_a_bounded_record(gpamap: GpaMap) -> None:
    converter = Converter(gpamap, history=100)
    for i in range(5000):
        converter.convert(RANGE, bool(i & 1), IMPLICIT, i & 3)
    records, total = converter.snapshot()
    assert (len(records), total) == (100, 5000)
    assert records[-1].to == "private"


def test_conversions_of_several_threads_do_not_mix(gpamap: GpaMap) -> None:
    inside: list[int] = []
    worst: list[int] = []

    class Watch(Recorder):
        def _do(self, name: str) -> None:
            inside.append(1)
            worst.append(len(inside))
            inside.pop()

    converter = Converter(gpamap, Watch())
    threads = [
        threading.Thread(target=lambda i=i: [converter.convert(RANGE, bool(n & 1), EXPLICIT, i) for n in range(300)]) for i in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(worst) == 1
    assert converter.total == 1200
