"""The command: setup, run, test, shell, selftests, status, clean.

Exit status: the inner command's own; 124 its time was up; 130 interrupted; 2 usage; 69 the lab is not set up; 70 the lab itself failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from lablib import initrd, kernel, machine, packages, selftests, source, status
from lablib.cache import Result, cache_root, remove, size_of
from lablib.words import Failure, say

TREE = Path(__file__).resolve().parents[2]
NOT_READY, FAILED, INTERRUPTED = 69, 70, 130


class NotReady(Failure):
    """Something must be set up first."""


def main() -> int:
    """Parse, do it, and turn failures into words and a status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = parse(sys.argv[1:])
    try:
        return int(options.action(options))
    except NotReady as failure:
        say(str(failure))
        return NOT_READY
    except Failure as failure:
        say(str(failure))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options before the command are ours; what follows `test` is pytest's, whatever it looks like."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("--"):
        at += 1 if "=" in arguments[at] else 2
    for_pytest: list[str] = []
    if arguments[at : at + 1] == ["test"]:
        arguments, for_pytest = arguments[: at + 1], arguments[at + 1 :]
    options = _parser().parse_args(arguments)
    options.arguments = for_pytest
    if options.command == "run":
        options.words = options.words[1:] if options.words[:1] == ["--"] else options.words
        if not options.words:
            _parser().error("run: which command? scripts/lab run -- COMMAND...")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="A small VM whose kernel has the real kvm_amd, under QEMU's TCG.")
    _machine_options(parser, first=True)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    setup = commands.add_parser("setup", help="make what is missing: packages, source, kernel, first process (minutes, once)")
    setup.add_argument("--install", action="store_true", help="apt-get install missing packages (root, or sudo without a password)")
    setup.add_argument("--update", action="store_true", help="ask the mirror again for a newer source")
    setup.add_argument("--selftests", action="store_true", help="build the kernel's KVM selftests too")
    setup.set_defaults(action=do_setup)

    test = commands.add_parser("test", help="the project's tests inside, on the real kernel; arguments are pytest's", add_help=False)
    test.set_defaults(action=do_test)

    shell = commands.add_parser("shell", help="a prompt inside")
    _machine_options(shell)
    shell.set_defaults(action=do_shell)

    run = commands.add_parser("run", help="any command inside, in the present directory: lab run -- COMMAND...")
    _machine_options(run)
    run.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    run.set_defaults(action=do_run)

    tests = commands.add_parser("selftests", help="the kernel's own KVM selftests inside, as a table")
    tests.add_argument("patterns", nargs="*", metavar="PATTERN", help="names or shell patterns, with or without x86/")
    tests.add_argument("--list", action="store_true", help="names only")
    tests.add_argument("--json", action="store_true", help="the rows as JSON on stdout when all have run")
    tests.add_argument("--limit", type=_seconds, default=selftests.LIMIT, metavar="S", help="seconds per test (default %(default)g)")
    _machine_options(tests)
    tests.set_defaults(action=do_selftests)

    state = commands.add_parser("status", help="what is there and what is missing; exit status 0 when the lab is ready, 1 when not")
    state.add_argument("--json", action="store_true")
    state.set_defaults(action=do_status)

    clean = commands.add_parser("clean", help="remove what is cached")
    part = clean.add_mutually_exclusive_group()
    part.add_argument(
        "--source", action="store_true", help="only unpacked sources, lists, and what builds have left (made again when needed)"
    )
    part.add_argument("--old", action="store_true", help="only what belongs to earlier sources and options")
    clean.set_defaults(action=do_clean)
    return parser


def _machine_options(parser: argparse.ArgumentParser, first: bool = False) -> None:
    """The machine's size and time, before the command (`first`, with the defaults) or after it."""

    def default(value: object) -> object:
        return value if first else argparse.SUPPRESS

    parser.add_argument("--cpus", type=_processors, default=default(2), metavar="N", help="the machine's processors, 1 to 8 (default 2)")
    parser.add_argument("--memory", type=_memory, default=default("4G"), metavar="SIZE", help="its memory, such as 4G or 512M (default 4G)")
    parser.add_argument(
        "--timeout", type=_seconds, default=default(None), metavar="S", help="end the machine after S seconds of the command: status 124"
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: seconds, more than 0")
    return value


def _processors(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 8:
        raise argparse.ArgumentTypeError(f"{text}: 1 to 8 processors")
    return value


def _memory(text: str) -> str:
    """A size as QEMU reads it, at least 512 MiB: the guest's files in memory are part of it."""
    digits, unit = text[:-1], text[-1:].upper()
    if not digits.isdecimal() or unit not in {"M", "G"} or not 512 <= int(digits) * (1024 if unit == "G" else 1) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text}: a size of 512M or more, such as 2G")
    return digits + unit


# -- commands ----------------------------------------------------------------------------------------------------------------------------


def do_setup(options: argparse.Namespace) -> int:
    purposes = ["run", "init"]
    if options.update or options.selftests or not _have_kernel():
        purposes.append("build")
    if options.selftests:
        purposes.append("selftests")
    packages.ensure(purposes, options.install, cache_root() / "packages.log")
    before = source.resolve_step().result() if options.update else None
    if options.update:
        source.forget_resolution()
    resolved = source.resolve()
    if before is not None and before != resolved:
        say(f"resolve: {before.get('version')} -> {resolved['version']}")
    kernel.build(resolved)
    initrd.build_init()
    if options.selftests:
        selftests.build(resolved)
    say(status.why_not(status.items()) or f"ready: Linux {resolved['version']}; try scripts/lab run -- ls -l /dev/kvm")
    return 0


def _have_kernel() -> bool:
    resolved = source.resolve_step().result()
    return resolved is not None and kernel.kernel_step(resolved).result() is not None


def _ready(options: argparse.Namespace) -> tuple[Result, machine.Machine]:
    parts = status.items()
    resolved = source.resolve_step().result()
    if not status.ready(parts) or resolved is None:
        raise NotReady(status.why_not(parts))
    image = kernel.kernel_step(resolved).directory / "bzImage"
    return resolved, machine.Machine(image, initrd.build_init(), options.cpus, options.memory)


def _interpreter() -> Path:
    """The project's own: the launcher runs this code with it."""
    return Path(sys.executable)


def do_run(options: argparse.Namespace) -> int:
    _, box = _ready(options)
    environment = machine.checked_environment(TREE, _interpreter())
    job = initrd.Job(list(options.words), os.getcwd(), environment, _rows_and_columns() if options.tty else None)
    return machine.run(box, job, machine.own_streams(True), options.timeout)


def do_shell(options: argparse.Namespace) -> int:
    if not os.isatty(0) or not os.isatty(1):
        raise Failure("a shell needs a terminal; for scripts: scripts/lab run -- COMMAND")
    _, box = _ready(options)
    environment = machine.checked_environment(TREE, _interpreter())
    environment["PS1"] = r"lab:\w# "
    say("exit or Ctrl-D leaves; Ctrl-] ends the machine; what is written inside is lost")
    shell = ["bash", "--norc"] if shutil.which("bash") else ["sh"]
    return machine.run(box, initrd.Job(shell, str(TREE), environment, _rows_and_columns()), machine.own_streams(True), options.timeout)


def _rows_and_columns() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.lines, size.columns


def do_test(options: argparse.Namespace) -> int:
    _, box = _ready(options)
    environment = machine.checked_environment(TREE, _interpreter())
    colour = ["--color=yes"] if sys.stdout.isatty() else []
    command = [str(_interpreter()), "-m", "pytest", "-p", "no:cacheprovider", *colour, *options.arguments]
    return machine.run(box, initrd.Job(command, str(TREE), environment), machine.own_streams(False), options.timeout)


def do_selftests(options: argparse.Namespace) -> int:
    resolved, box = _ready(options)
    folder = selftests.build(resolved)
    names = selftests.choose(selftests.programs(folder), options.patterns)
    if options.list:
        print("\n".join(names))
        return 0
    table = selftests.Table((lambda row: say(f"{row.test}: {row.verdict}")) if options.json else selftests.show_row)
    try:
        selftests.run(box, folder, names, options.limit, table, _interpreter())
    finally:
        selftests.keep(resolved, table.rows)
        if options.json:
            print(json.dumps(table.as_json(), indent=1))
        say(f"selftests of {resolved['version']}: {table.summary()}")
    return selftests.status_of(table)


def do_status(options: argparse.Namespace) -> int:
    parts = status.items()
    print(status.as_json(parts) if options.json else status.as_text(parts))
    return 0 if status.ready(parts) else 1


def do_clean(options: argparse.Namespace) -> int:
    root = cache_root()
    before = size_of(root)
    if options.source:
        source.drop_trees()
        for left in (*root.glob("*/build"), *root.glob("resolve-*/apt")):
            remove(left)
    elif options.old:
        current = {part.path for part in status.items()}
        for folder in (path for path in root.glob("*-*") if path.is_dir() and str(path) not in current):
            remove(folder)
    else:
        remove(root)
    say(f"removed {(before - size_of(root)) / (1 << 20):,.0f} MiB from {root}")
    return 0
