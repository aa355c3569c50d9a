"""The grammar of the command line: verbs, options, defaults. What a verb does is in its own file.

Options that the architecture names for later (`--gdb`, `--shell`, `--record`, `--map`) are not offered before they work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vmm.cli import status, values

TYPES = ("plain", "sw-protected", "sev", "sev-es")
RUNGS = ("auto", "kernel", "model")
DIALECTS = ("mainline",)
LATER_DIALECTS = ("upm-v6", "upm-v7", "page-enc-v6", "page-enc-v8")

_DESCRIPTION = "A userspace VMM for test guests with private memory: real /dev/kvm and /dev/sev, or a software model of the same."
_EPILOG = """\
exit status of run: the guest's own code; 4 this host cannot; 124 timeout; 2 usage;
70 the VMM failed; 130 interrupted. SEVMM_DEBUG=1 shows the traceback of an error."""

_RUN_EXAMPLES = """\
examples:
  sevmm run hello                                  the guest's own first type, the kernel if it can
  sevmm run hello --type plain --on kernel         this machine's /dev/kvm or nothing
  sevmm run private-memory --type sev --json       one JSON object on stdout
  sevmm run ./guest.elf --memory 256M --timeout 5
  sevmm run x86/smptest.flat --vcpus 2             a Multiboot image, as kvm-unit-tests builds them
  sevmm run ./memtest86+x64.bin --append "console=ttyS0,115200"

exit status: the guest's own code; 4 this host cannot; 124 timeout; 2 usage; 70 the VMM failed; 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.removeprefix("argument ").split())
        self.exit(status.USAGE, f"{self.prog}: {text}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"sevmm {version()}")
        parser.exit()


def version() -> str:
    """The version of this tree (its pyproject.toml), or of the installed distribution."""
    import tomllib

    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        if project["name"] == "sevmm":
            return str(project["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass  # not a tree: an installed wheel
    from importlib import metadata

    try:
        return metadata.version("sevmm")
    except metadata.PackageNotFoundError:
        return "of unknown version (neither a source tree nor an installed distribution)"


def build_parser() -> Parser:
    """The whole grammar. Building it imports no verb."""
    parser = Parser(
        prog="sevmm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    _add_doctor(verbs)
    _add_guests(verbs)
    _add_run(verbs)
    _add_completion(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str | None = None) -> Parser:
    parser: Parser = verbs.add_parser(
        name, help=text, description=text, epilog=epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(verb=run)
    return parser


def _add_doctor(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import doctor

        return doctor.run(options)

    parser = _verb(verbs, "doctor", run, "what this host can do, per rung, with the evidence and the remedy")
    parser.add_argument("--json", action="store_true", help="the same as data: one JSON object on stdout")


def _add_guests(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import guests

        return guests.run(options)

    _verb(verbs, "guests", run, "the bundled guests, each with the property it proves")


def _add_run(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import run as run_verb

        return run_verb.run(options)

    parser = _verb(verbs, "run", run, "run one guest to its end and say what happened", _RUN_EXAMPLES)
    guest = parser.add_argument("guest", metavar="GUEST", help="a bundled guest (see sevmm guests) or a path: ELF64, Multiboot, bzImage")
    guest.complete = GUEST_COMPLETION  # type: ignore[attr-defined]  # shtab's convention
    add = parser.add_argument
    add("--type", choices=TYPES, help="VM type (default: the first one of the guest; plain for a path)")
    add("--on", choices=RUNGS, default="auto", help="which side of the seam answers (default: auto, the kernel when it can)")
    add("--dialect", type=_dialect, default="mainline", metavar="D", help="whose ioctl numbers: mainline (the only one yet)")
    add("--memory", type=values.size, default=64 << 20, metavar="SIZE", help="guest memory, for example 64M or 1G (default: 64M)")
    add("--vcpus", type=values.vcpus, default=1, metavar="N", help="number of vCPUs, 1 to 64 (default: 1)")
    add("--policy", type=values.policy, metavar="HEX", help="SEV policy (default: no debugging, no key sharing)")
    add("--timeout", type=values.timeout, default=60.0, metavar="S", help="seconds until the guest is stopped (default: 60; 0: no limit)")
    add(
        "--arguments", "--append", type=values.arguments, default="", metavar="TEXT",
        help="text that the guest finds in its boot information, or as its command line",
    )  # fmt: skip
    add("--json", action="store_true", help="one JSON object on stdout instead of the guest's console and the summary")


def _add_completion(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import completion

        return completion.run(options)

    parser = _verb(verbs, "completion", run, 'print a completion script: eval "$(sevmm completion bash)"')
    parser.add_argument("shell", choices=["bash", "zsh"])


def _dialect(text: str) -> str:
    if text in DIALECTS:
        return text
    if text in LATER_DIALECTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not built yet; only mainline is")
    raise argparse.ArgumentTypeError(f"{text!r} is no dialect (known: mainline)")


GUEST_COMPLETION = {"bash": "_sevmm_guests", "zsh": "_sevmm_guests"}
"""Names of the shell functions that completion.py defines."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse without running; for tests and for tools that take the same options."""
    return build_parser().parse_args(argv)
