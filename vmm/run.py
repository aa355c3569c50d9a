"""Run one guest from start to end and report: the call behind `sevmm run`, the tests and the library user.

    >>> from vmm.run import GuestRequest, run_guest
    >>> report = run_guest(GuestRequest("private-memory", type="sev"))   # doctest: +SKIP
    >>> report.result, report.launch.match                               # doctest: +SKIP
    ('pass', True)

Everything that can go wrong ends in the report: a wrong request (`usage`), a host that cannot (`unsupported`), a guest that does not end
(`timeout`), a guest or host that fails (`error`). What is not the guest's doing and not foreseen here, a bug, raises; so does
KeyboardInterrupt. In every case all that was built is released first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from kvmapi.errors import KvmApiError, KvmError
from vmm.boot import MAX_ARGUMENTS
from vmm.image import Image, ImageError
from vmm.report import RunReport
from vmm.rungs import RUNGS, TYPES, Rung, Unsupported, choose

if TYPE_CHECKING:
    from guest.catalogue import Guest
    from kvmapi.host import Host
    from vmm.config import MachineConfig
    from vmm.machine import Machine

MAP_ROWS = 65536
"""Ranges of the map in a report; a hostile guest can make millions."""


class Refused(Exception):
    """The request itself is wrong; one sentence."""


@dataclass(frozen=True)
class GuestRequest:
    """What to run and how.

    `guest`: a bundled name or a path. `type`: a key of `vmm.rungs.TYPES`; None = what the guest's catalogue row prefers, else plain.
    `on`: auto, kernel or model. `memory`: bytes. `policy`: SEV policy, None = NODBG|NOKS (and ES for sev-es). `timeout`: seconds, None
    = no limit. `arguments`: text the guest finds in its boot info, at most 1023 bytes. `console`: called with console output line by
    line as it comes (bytes). `host`: use this Host instead of choosing one (tests, recording). `on_stage`: called with the machine and
    the stage number when the guest writes the stage port, in the vCPU's thread, while that vCPU is stopped.

    `secret`: 1 to `boot.MAX_SECRET` bytes that the guest's owner seals for it once its measurement matched (type sev or sev-es; never
    shown anywhere, and a bytearray may be wiped by the caller after the call). `save_launch`: a file for what was measured
    (`vmm.saved_launch`), written before the guest starts. `progress`: called with bytes measured and bytes to measure, while a SEV guest
    is launched.
    """

    guest: str
    type: str | None = None
    on: str = "auto"
    dialect: str = "mainline"
    memory: int = 64 << 20
    vcpus: int = 1
    policy: int | None = None
    timeout: float | None = 60.0
    arguments: str = ""
    console: Callable[[bytes], None] | None = None
    host: Host | None = None
    on_stage: Callable[[Machine, int], None] | None = None
    secret: bytes | bytearray | None = field(default=None, repr=False)
    save_launch: str | None = None
    progress: Callable[[int, int], None] | None = None


def run_guest(request: GuestRequest) -> RunReport:
    """Build the machine, run the guest to its end, take everything down again and report.

    Never raises for what a guest, an image or the host does wrong: the report says `error`, `timeout` or `unsupported` with a sentence in
    `message`. KeyboardInterrupt, what `console` or `on_stage` raise, and bugs pass through after everything has been released.
    """
    report = RunReport(request.guest, request.type or "plain", request.dialect)
    try:
        machine = _build(request, report)
    except (Refused, ImageError) as refusal:
        report.usage = True
        report.message = str(refusal)
    except Unsupported as answer:
        report.result, report.message, report.remedy = "unsupported", answer.reason, answer.remedy
    except KvmError as failure:
        report.message, report.remedy = _explain(failure, request.memory)
    except (OSError, KvmApiError, MemoryError) as failure:
        report.message = str(failure) or type(failure).__name__
    else:
        with machine:
            if _saved(request, machine, report):
                _run(request, machine, report)
    return report


def _build(request: GuestRequest, report: RunReport) -> Machine:
    """Everything before the guest's first instruction; `report` learns the type and the rung."""
    from vmm.machine import Machine

    row = find_guest(request.guest)
    report.type = request.type or (row.types[0] if row else "plain")
    _check(request, report.type, row)
    image = load_guest(request.guest, row)
    return Machine(_config(request, report, row, image))


# -- before the run ----------------------------------------------------------------------------------------------------------------------


def find_guest(name: str) -> Guest | None:
    """The catalogue row of a bundled name; None for a path. A name wins over a file of the same name: write ./NAME for the file.

    Raises `Refused` where there is neither.
    """
    from guest.catalogue import GUESTS

    for row in GUESTS:
        if row.name == name:
            return row
    if os.sep not in name and not os.path.exists(name):
        raise Refused(f"{name!r} is neither a bundled guest ({', '.join(g.name for g in GUESTS)}) nor a file")
    return None


def _check(request: GuestRequest, type: str, row: Guest | None) -> None:
    """Refuse what no machine can make sense of, before anything is built."""
    if type not in TYPES:
        raise Refused(f"there is no VM type {type!r}; there are {', '.join(TYPES)}")
    if request.on not in RUNGS:
        raise Refused(f"there is no rung {request.on!r}; there are {', '.join(RUNGS)}")
    if request.dialect != "mainline":
        raise Refused(f"there is no dialect {request.dialect!r}; there is mainline")
    if row is not None and type not in row.types:
        raise Refused(f"the guest {row.name} runs on type {' or '.join(row.types)}, not on {type}")
    if request.secret is not None and not type.startswith("sev"):
        raise Refused(f"only a guest of type sev or sev-es can be given a secret, not one of type {type}")
    if request.secret is not None and row is not None and not row.takes_secret:
        raise Refused(f"the guest {row.name} does not look for a secret; the guest secret does")
    if request.save_launch is not None:
        _check_save(request.save_launch, type)
    if request.timeout is not None and not request.timeout > 0:
        raise Refused(f"a time limit of {request.timeout} s is not more than 0")
    if len(request.arguments.encode(errors="surrogateescape")) > MAX_ARGUMENTS:
        raise Refused(f"the guest's arguments must be at most {MAX_ARGUMENTS} bytes")


def _check_save(path: str, type: str) -> None:
    """A launch can be saved where there is one, and where the file can be written: better asked now than after it."""
    from vmm.saved_launch import SavedLaunchError, check_target

    if not type.startswith("sev"):
        raise Refused(f"a guest of type {type} is not measured, so there is no launch to save; use type sev")
    try:
        check_target(path)
    except SavedLaunchError as refusal:
        raise Refused(str(refusal)) from refusal


def load_guest(path: str, row: Guest | None) -> Image:
    """Load the guest; build it first if it is a bundled one (`row`). Raises ImageError, Unsupported (no compiler), OSError."""
    from vmm.image import load

    if row is None:
        return load(path)
    from guest.build import BuildError, ToolMissing, build

    try:
        return load(build(row.name))
    except ToolMissing as missing:
        raise Unsupported(str(missing)) from missing
    except BuildError as failure:
        raise OSError(str(failure)) from failure


def _config(request: GuestRequest, report: RunReport, row: Guest | None, image: Image) -> MachineConfig:
    """Choose the rung and say what is to be built on it."""
    from vmm.config import ConfigError, MachineConfig

    try:
        wanted = MachineConfig(
            image=image, type=report.type, memory=request.memory, vcpus=request.vcpus, policy=request.policy,
            arguments=request.arguments.encode(errors="surrogateescape"), lazy_private=bool(row and row.lazy_private),
            irqchip=bool(row and row.irqchip),
            console=request.console, secret=request.secret, record=request.save_launch is not None, progress=request.progress,
        )  # fmt: skip
        wanted.check()
    except ConfigError as refusal:
        raise Refused(str(refusal)) from refusal
    needs = row.needs if row else frozenset[str]()
    if request.host is not None:
        rung = Rung(request.host.name, request.host, "the caller's own host")
    else:
        rung = choose(report.type, request.on, needs)
    report.rung, report.rung_reason = rung.name, rung.reason
    return replace(wanted, host=rung.host, hypercalls=rung.name != "kernel" or _kernel_hypercalls(rung.host, needs))


def _kernel_hypercalls(host: Host, needs: frozenset[str]) -> bool:
    """Whether the guest may be told that hypercalls exit. When it needs them, the rung was chosen for that."""
    from vmm import probe

    return "hypercall" in needs or probe.hypercall_exits(host)


# -- the run -----------------------------------------------------------------------------------------------------------------------------


def _saved(request: GuestRequest, machine: Machine, report: RunReport) -> bool:
    """Write the launch to its file if that was asked for; False when it could not be written, and then the guest is not run."""
    if request.save_launch is None:
        return True
    from vmm.saved_launch import SavedLaunchError, save

    measurement = machine.measurement(request.guest)
    try:
        if measurement is not None:
            save(measurement, request.save_launch)
    except SavedLaunchError as failure:
        report.launch, report.message = machine.launch, f"{failure}; the guest was not run"
        return False
    return True


def _run(request: GuestRequest, machine: Machine, report: RunReport) -> None:
    """Run and collect. Only the host's failures are the report's business here: what a sink or a hook raises is its owner's."""
    report.launch = machine.launch
    if request.on_stage is not None:
        hook = request.on_stage
        machine.devices.stage.on_stage = lambda stage: hook(machine, stage)
    try:
        outcome = machine.run(request.timeout)
    except (KvmError, KvmApiError) as failure:
        report.message = str(failure)
    else:
        report.result, report.exit_code, report.message = outcome.result, outcome.exit_code, outcome.message
        report.exits, report.elapsed_s = outcome.exits, outcome.elapsed_s
    machine.devices.console.flush()
    report.console = machine.devices.console.text()
    report.conversions, report.conversions_total = machine.converter.snapshot()
    rows = list(islice(machine.map.ranges(), MAP_ROWS + 1))
    report.map = rows[:MAP_ROWS]
    report.notes += machine.notes()
    if len(rows) > MAP_ROWS:
        report.notes.append(f"the map has more than {MAP_ROWS} ranges; the rest is not in the report")


def _explain(failure: KvmError, memory: int) -> tuple[str, str]:
    """Message and remedy for a KVM call that failed; a memory lock limit gets its name."""
    if failure.errno == 12 and failure.ioctl in ("KVM_MEMORY_ENCRYPT_REG_REGION", "KVM_SEV_LAUNCH_UPDATE_DATA"):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
        return (
            f"{memory >> 10} KiB of guest memory cannot be pinned: RLIMIT_MEMLOCK is {limit}",
            "raise the limit (ulimit -l unlimited, or memlock in /etc/security/limits.conf), or ask for less --memory",
        )
    return str(failure), ""
