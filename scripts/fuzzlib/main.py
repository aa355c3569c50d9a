"""The command: fuzz in a process of its own, show how far it is, and say what came of it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzzlib.calls import Log
from fuzzlib.fuzzer import Plan, child
from fuzzlib.processes import ENVIRONMENT, INTERRUPTED, positive

TREE = Path(__file__).resolve().parents[2]
_CHILD = "import sys; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; from fuzzlib.main import main; sys.exit(main())"


def main() -> int:
    """Exit status 0 when nothing was found, 1 when something was, 2 usage, 130 Ctrl-C."""
    try:
        return _main()
    except KeyboardInterrupt:
        print("fuzz: interrupted", file=sys.stderr)
        return INTERRUPTED


def _main() -> int:
    if sys.argv[1:2] == ["snippets"]:
        from fuzzlib import snippets

        return snippets.main(sys.argv[2:])
    if sys.argv[1:2] == ["sev"]:
        from fuzzlib import sev

        return sev.main(sys.argv[2:])
    options = _parser().parse_args()
    plan = Plan(options.calls, options.seed, options.threads, options.seconds)
    if options.child:
        return child(plan, options.child)
    print(f"fuzz: seed {plan.seed}, {plan.calls:,} calls in {plan.threads} threads", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="sevmm-fuzz-") as folder:
        path = Path(folder) / "calls"
        log = Log(path, plan.threads, create=True)
        status, summary, errors = _run(plan, path, log)
        if status or summary is None:
            _tell(plan, log, status, summary, errors)
    if summary is not None:
        print(json.dumps(summary, indent=2))
    return 1 if status or summary is None else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuzz",
        description="Any ioctl, any argument, any fd, in any order, from several threads, against the model. JSON on stdout.",
        epilog="`fuzz snippets` and `fuzz sev` are other subjects: hostile code in guests, and sequences of SEV commands against a "
        "reference (see fuzz snippets --help, fuzz sev --help). "
        "One thread and one seed make the same calls each time; with more, their order is the machine's.",
    )
    parser.add_argument("--calls", type=positive, default=100_000, metavar="N", help="how many ioctls (100000)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="what the random choices begin with (1)")
    parser.add_argument("--threads", type=positive, default=3, metavar="N", help="how many threads make them (3)")
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S", help="stop after this time (an hour)")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    return parser


def _run(plan: Plan, path: Path, log: Log) -> tuple[int, dict[str, Any] | None, str]:
    """(exit status, summary if there is one, what it said on stderr)."""
    command = [sys.executable, "-P", "-c", _CHILD, str(TREE), str(TREE / "scripts"), "--child", str(path)]
    for name in ("calls", "seed", "threads", "seconds"):
        command += [f"--{name}", str(getattr(plan, name))]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=TREE, env=ENVIRONMENT)
        try:
            _progress(process, plan, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        errors.seek(0)
        try:
            summary = json.loads(out.read())
        except ValueError:
            summary = None
        return process.returncode, summary, errors.read()


def _progress(process: subprocess.Popen[bytes], plan: Plan, log: Log) -> None:
    """Wait, with a line that counts on a terminal. What runs a minute longer than it should is killed by the caller."""
    start, live = time.monotonic(), sys.stderr.isatty()
    while process.poll() is None and time.monotonic() - start < plan.seconds + 120:
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            if live:
                seconds = time.monotonic() - start
                done = sum(log.counts())
                print(f"\rfuzz: {done:,} of {plan.calls:,} calls, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)
    if live:
        print(file=sys.stderr)


def _tell(plan: Plan, log: Log, status: int, summary: dict[str, Any] | None, errors: str) -> None:
    """What went wrong, and how to see it again."""
    say = lambda text: print(f"fuzz: {text}", file=sys.stderr)  # noqa: E731
    if summary is None:
        say(f"the process ended with status {status}" + (f" (signal {-status})" if status < 0 else ""))
    for finding in summary["findings"] if summary else ():
        say(f"FOUND {finding}")
    if errors.strip():
        say("it said:\n" + errors[-6000:])
    for thread in range(plan.threads):
        for line in log.last(thread):
            say(line)
    say(f"again: scripts/fuzz --calls {plan.calls} --seed {plan.seed} --threads {plan.threads}")


if __name__ == "__main__":
    sys.exit(main())
