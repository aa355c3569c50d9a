"""The pytest plugin: fixtures, markers and options of the selftests for any pytest run, and the suites themselves as pytest tests.

    pytest --pyargs vmm.selftests.suites                     the suites
    pytest my_tests.py --sevmm-on model                      tests of one's own, with the fixtures of docs/selftests.md

- fixtures: case, host, system, vm, guest, machine, subtest, note, keep: as under `sevmm selftest`, because they are the same objects;
- markers: `sev`, `sev_es`, `sw_protected` choose the VM types a test runs on, once on each (none: type plain); `kvm`: on the kernel only.
  They, and `runs_on`, mean something to tests that use these fixtures, and to no others;
- a test whose case has no host here is skipped with the doctor's words; `--require sev,kvm` makes it fail where the *kernel*
  does not have what is named, for a machine that is known to have it;
- the time limit of a test is not the plugin's: waits of a `Bench` end by themselves, for everything else there is pytest-timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vmm.rungs import TYPES
from vmm.selftests.case import MAINLINE, RunsOn, Skip, case_id, combinations, declared, find_case
from vmm.selftests.fixtures import NAMES, Fixtures

pytest.register_assert_rewrite("vmm.selftests.suites")

SUITES = Path(__file__).parent / "suites"
TYPE_MARKERS = {"sev": "sev", "sev_es": "sev-es", "sw_protected": "sw-protected"}
MARKERS = {
    "sev": "runs on VM type sev",
    "sev_es": "runs on VM type sev-es",
    "sw_protected": "runs on VM type sw-protected",
    "kvm": "runs on the kernel's KVM, not on the model",
}
KINDS = ("kvm", "sev", "sev_es", "sw_protected", "hypercall")
"""What --require may name here; each is the doctor's kind with a dash for the underscore."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the group sevmm. They are there in every run of a Python that has this package, hence their names."""
    group = parser.getgroup("sevmm", "selftests of KVM (sevmm)")
    group.addoption(
        "--sevmm-on", choices=("auto", "kernel", "model"), default="auto", help="whose KVM: the kernel's where it can, or one side only"
    )
    group.addoption("--sevmm-type", choices=tuple(TYPES), help="only the runs on this VM type")
    group.addoption("--sevmm-dialect", metavar="D", help="only the runs in this dialect (mainline, upm-v6, ...)")
    group.addoption(
        "--require", action="append", default=[], metavar="KIND[,KIND...]",
        help=f"fail instead of skipping where the kernel lacks this; of: {', '.join(KINDS)}",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, and refuse a --require of what nobody knows: a project may have kinds, that is markers, of its own."""
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    known = {line.split(":")[0].split("(")[0].strip() for line in config.getini("markers")}
    unknown = _required(config) - known - set(KINDS)
    if unknown:
        raise pytest.UsageError(f"--require {', '.join(sorted(unknown))}: not one of {', '.join(KINDS)}")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Suites are not called test_*.py; one that is named on the command line is collected by pytest itself."""
    if file_path.parent != SUITES or file_path.suffix != ".py" or file_path.name == "__init__.py" or parent.session.isinitpath(file_path):
        return None
    module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
    return module


class _Run(NamedTuple):
    """One combination that a test is to be run on."""

    type: str = "plain"
    dialect: str = MAINLINE
    said: RunsOn = RunsOn()


def what(definition: Any) -> RunsOn:
    """What a test says: by `runs_on`, else by its markers."""
    function: Callable[..., object] = definition.obj
    said = declared(function)
    types = tuple(type for marker, type in TYPE_MARKERS.items() if definition.get_closest_marker(marker) is not None)
    if types and not hasattr(function, "__selftest__"):
        said = replace(said, types=types)
    if definition.get_closest_marker("kvm") is not None:
        said = replace(said, rungs=("kernel",))
    return said


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run per VM type and dialect, for tests that use the fixture `case`, if only by using another one."""
    if "case" not in metafunc.fixturenames:
        return
    said = what(metafunc.definition)
    marks = {type: getattr(pytest.mark, marker) for marker, type in TYPE_MARKERS.items()}
    metafunc.parametrize(
        "case",
        [
            pytest.param(_Run(type, dialect, said), id=case_id(type, dialect), marks=[marks[type]] if type in marks else [])
            for type, dialect in combinations(said)
        ],
        indirect=True,
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the runs that --sevmm-type and --sevmm-dialect do not ask for."""
    type, dialect = config.getoption("--sevmm-type"), config.getoption("--sevmm-dialect")
    left_out = [item for item in items if not _wanted(item, type, dialect)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _wanted(item, type, dialect)]


def _wanted(item: pytest.Item, type: str | None, dialect: str | None) -> bool:
    callspec = getattr(item, "callspec", None)
    run = callspec.params.get("case") if callspec is not None else None
    return not isinstance(run, _Run) or (type in (None, run.type) and dialect in (None, run.dialect))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """What a test says with the framework's words becomes pytest's: `Skip`, and parts that failed."""
    fixtures: Any = pyfuncitem.funcargs.get("_selftest")
    try:
        answer = yield
    except Skip as reason:
        if fixtures is None or not fixtures.subtest.parts:
            pytest.skip(str(reason))
        answer = True
    if fixtures is not None:
        _show_notes(pyfuncitem, fixtures.notes)
        parts = fixtures.subtest
        if parts.failed:
            pytest.fail("\n".join(f"subtest {part.name}: {part.text}" for part in parts.failed), pytrace=False)
        if parts.all_skipped:
            pytest.skip(parts.parts[0].text)
    return answer


def _show_notes(item: pytest.Function, notes: list[str]) -> None:
    """In the report's section (-rA), and as properties in JUnit."""
    if notes:
        item.add_report_section("call", "notes", "\n".join(notes))
        item.user_properties += [("note", note) for note in notes]


@cache
def _missing(kind: str) -> str | None:
    from vmm.doctor import reason_missing

    return reason_missing(kind.replace("_", "-"))


def _required(config: pytest.Config) -> set[str]:
    return {kind.strip().replace("-", "_") for text in config.getoption("--require") for kind in text.split(",") if kind.strip()}


def _needed(type: str, said: RunsOn) -> list[str]:
    """The kinds that a run on the kernel needs."""
    return [*(marker for marker, name in TYPE_MARKERS.items() if name == type), *said.needs, "kvm"]


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Any:
    """The combination that this run is for; skips where no host can."""
    type, dialect, said = getattr(request, "param", _Run())
    on = request.config.getoption("--sevmm-on")
    for kind in _needed(type, said) if "kernel" in said.rungs and dialect == MAINLINE else ():
        if kind in _required(request.config) and (reason := _missing(kind)) is not None:
            pytest.fail(f"--require {kind}, but this host lacks it: {reason}", pytrace=False)
    try:
        return find_case(type, dialect, said, on)
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.fixture
def _selftest(case: Any) -> Iterator[Fixtures]:
    """All fixtures of one run, made when they are asked for."""
    with Fixtures(case) as fixtures:
        yield fixtures


def _fixture(name: str) -> Any:
    @pytest.fixture(name=name)
    def give(_selftest: Fixtures) -> Any:
        return _from(_selftest, name)

    give.__doc__ = f"See docs/selftests.md: `{name}`."
    return give


def _from(fixtures: Fixtures, name: str) -> Any:
    """A fixture of ours; pytest's word for one that cannot be had."""
    try:
        return fixtures.get(name)
    except Skip as reason:
        pytest.skip(str(reason))


host, system, vm, guest, machine, subtest, note, keep = map(_fixture, NAMES[1:])
