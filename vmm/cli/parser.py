"""The grammar of the command line: verbs, options, defaults. What a verb does is in its own file.

Options that the architecture names for later (`--gdb`, `--shell`, `--map`, `--record` of `run`) are not offered before they work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vmm.cli import exec_options, sev_values, status, values

TYPES = ("plain", "sw-protected", "sev", "sev-es")
SEV_TYPES = ("sev", "sev-es")
RUNGS = ("auto", "kernel", "model")
DIALECTS = ("mainline",)
TESTED_DIALECTS = ("upm-v6", "attr-2022", "upm-v7", "attr-v10", "attr-v11")  # the bundled guests do not speak them
LATER_DIALECTS = ("page-enc-v6", "page-enc-v8")

_DESCRIPTION = "A userspace VMM for test guests with private memory: real /dev/kvm and /dev/sev, or a software model of the same."
_EPILOG = """\
exit status of run: the guest's own code; 4 this host cannot; 124 timeout; 2 usage;
70 the VMM failed; 130 interrupted. SEVMM_DEBUG=1 shows the traceback of an error."""

_RUN_EXAMPLES = """\
examples:
  sevmm run hello                                  the guest's own first type, the kernel if it can
  sevmm run hello --type plain --on kernel         this machine's /dev/kvm or nothing
  sevmm run private-memory --type sev --json       one JSON object on stdout
  sevmm run secret --secret key.bin --arguments nonce=7     a secret that only its owner and the measured guest know
  sevmm run ./guest.elf --memory 256M --timeout 5
  sevmm run x86/smptest.flat --vcpus 2             a Multiboot image, as kvm-unit-tests builds them
  sevmm run ./memtest86+x64.bin --append "console=ttyS0,115200"

exit status: the guest's own code; 4 this host cannot; 124 timeout; 2 usage; 70 the VMM failed; 130 interrupted"""


_MEASURE_EXAMPLES = """\
examples:
  sevmm measure hello                              the digest of hello on type sev, region by region
  sevmm measure hello --type sev-es --vcpus 2      with the save area (VMSA) of each vCPU
  sevmm run hello --type sev --save-launch l.json; sevmm measure hello --verify l.json
  sevmm measure hello --tik tik.bin --nonce 4fbe0bedbad6c86ae8f68971d103e554 --api 0.24 --build 15

exit status: 0 (with --verify: the same), 1 it differs, 2 usage, 4 this host cannot (no compiler), 70 the VMM failed"""


_PLATFORM_EXAMPLES = """\
examples:
  sevmm platform status                            this host's, or the model's; the first line says which
  sevmm platform export certs; sevmm platform verify certs
  sevmm platform csr pek_csr.cert                  an owner signs it: sevmm platform import pek_csr.signed.cert oca.cert
  sevmm platform reset --on model --yes

exit status: 0; 1 the firmware refused, or a link of the chain does not hold; 2 usage or a file; 4 this host cannot"""


_SELFTEST_EXAMPLES = """\
examples:
  sevmm selftest                                   everything, on the kernel what it can and on the model the rest
  sevmm selftest sev_smoke 'guest_memfd.*' --on model
  sevmm selftest --type sev-es -j 4 --timeout 60
  sevmm selftest --ktap                            also --json, --junit FILE
  sevmm selftest vm_types -j 0                     in this process: for a debugger

exit status: 0; 1 a test failed; 2 usage; 4 nothing could run here; 70 the VMM failed; 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and name the verb that did not understand."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what a verb does not know is its own mistake, not that of `sevmm`."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.removeprefix("argument ").split())
        self.exit(status.USAGE, f"{self.prog}: {text}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from vmm.version import version

        print(f"sevmm {version()}")
        parser.exit()


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
    exec_options.add(_verb, verbs, (*DIALECTS, *TESTED_DIALECTS))
    _add_measure(verbs)
    _add_platform(verbs)
    _add_selftest(verbs)
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
    _add_guest(parser, "ELF64, Multiboot, bzImage")
    add = parser.add_argument
    add("--type", choices=TYPES, help="VM type (default: the first one of the guest; plain for a path)")
    _add_on(parser)
    add("--dialect", type=_dialect, default="mainline", metavar="D", help="whose ioctl numbers: mainline (others: sevmm selftest)")
    _add_launch(parser)
    add("--timeout", type=values.timeout, default=60.0, metavar="S", help="seconds until the guest is stopped (default: 60; 0: no limit)")
    add("--secret", metavar="FILE", help="what a SEV guest's owner gives it after a right measurement (- for stdin)")
    add("--save-launch", metavar="FILE", help="write what the launch measured, for sevmm measure --verify (no keys in it)")
    add("--json", action="store_true", help="one JSON object on stdout instead of the guest's console and the summary")


def _add_on(parser: Parser) -> None:
    parser.add_argument(
        "--on", choices=RUNGS, default="auto", help="which side of the seam answers (default: auto, the kernel when it can)"
    )


def _add_guest(parser: Parser, files: str) -> None:
    """The guest of `run` and `measure`; `files`: what a path may lead to."""
    guest = parser.add_argument("guest", metavar="GUEST", help=f"a bundled guest (see sevmm guests) or a path: {files}")
    guest.complete = GUEST_COMPLETION  # type: ignore[attr-defined]  # shtab's convention


def _add_launch(parser: Parser) -> None:
    """What `run` and `measure` are told of a launch in the same words, so that the one's options are the other's."""
    add = parser.add_argument
    add("--memory", type=values.size, default=64 << 20, metavar="SIZE", help="guest memory, for example 64M or 1G (default: 64M)")
    add("--vcpus", type=values.vcpus, default=1, metavar="N", help="number of vCPUs, 1 to 64 (default: 1)")
    add("--policy", type=values.policy, metavar="HEX", help="SEV policy (default: no debugging, no key sharing; SEV-ES for sev-es)")
    add(
        "--arguments", "--append", type=values.arguments, default="", metavar="TEXT",
        help="text that the guest finds in its boot information, or as its command line",
    )  # fmt: skip


def _add_measure(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import measure

        return measure.run(options)

    parser = _verb(verbs, "measure", run, "predict what a launch measures, without any device, or compare with one", _MEASURE_EXAMPLES)
    _add_guest(parser, "ELF64")
    add = parser.add_argument
    add("--type", choices=SEV_TYPES, default="sev", help="VM type (default: sev)")
    _add_launch(parser)
    add("--init", choices=("init", "init2"), default="init2", help="the command that makes a SEV VM: (ES_)INIT, or INIT2 (default)")
    add("--c-bit", type=sev_values.c_bit, default=51, metavar="N", help="the host's C-bit (default: 51; 47 on the first two EPYCs)")
    add(
        "--features",
        type=sev_values.features,
        default=0xB,
        metavar="HEX",
        help="what the host's KVM offers, as the boot info says it (default: 0xb)",
    )
    add("--tik", metavar="FILE", help="the owner's integrity key, 16 bytes: predicts the MAC too, or checks a saved one")
    add("--nonce", type=sev_values.nonce, metavar="HEX", help="LAUNCH_MEASURE's nonce, 16 bytes")
    add("--api", type=sev_values.api, metavar="X.Y", help="the firmware's API version, for example 0.24 (sevmm platform status)")
    add("--build", type=sev_values.build, metavar="N", help="the firmware's build, 0 to 255")
    add("--save", metavar="FILE", help="write the prediction to a file")
    add("--verify", metavar="FILE", help="compare with a saved launch or prediction, or the output of run --json; exit 0 same, 1 differs")
    add("--json", action="store_true", help="the prediction as one JSON object on stdout")


def _add_platform(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import platform

        return platform.run(options)

    parser = _verb(verbs, "platform", run, "a SEV platform's identity: its state, owner, keys and certificates", _PLATFORM_EXAMPLES)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action", parser_class=Parser)

    def action(name: str, text: str, *, device: bool = True) -> Callable[..., Any]:
        made: Parser = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if device:
            made.add_argument("--on", choices=RUNGS, default="auto", help="whose /dev/sev (default: auto, the kernel's if it opens)")
        made.add_argument("--json", action="store_true", help="one JSON object on stdout")
        return made.add_argument

    action("status", "version, state, owner and chip id")
    add = action("export", "write the platform's certificates, for an owner to verify")
    add("directory", metavar="DIR", help="where pdh.cert, pek.cert, oca.cert, cek.cert and cert_chain.cert go")
    add("--force", action="store_true", help="overwrite files that are there")
    add = action("csr", "write the request that a new owner signs")
    add("file", metavar="FILE", help="where the request goes (2084 bytes)")
    add("--force", action="store_true", help="overwrite a file that is there")
    add = action("import", "give the platform an owner")
    add("pek", metavar="PEK", help="the request, signed by the owner")
    add("oca", metavar="OCA", help="the owner's self-signed certificate")
    action("pdh-gen", "draw a new Diffie-Hellman key: sessions made for the old one are worthless")
    add = action("reset", "forget the owner and draw new keys; not while there are guests")
    add("--yes", action="store_true", help="do not ask")
    add = action("verify", "check the signatures of a chain, offline", device=False)
    add("directory", metavar="DIR", help="what export wrote, with AMD's ask.cert and ark.cert, or sevctl's file")


def _add_selftest(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import selftest

        return selftest.run(options)

    parser = _verb(verbs, "selftest", run, "test this host's KVM, or the model, as the kernel's selftests do", _SELFTEST_EXAMPLES)
    add = parser.add_argument
    add("patterns", metavar="PATTERN", nargs="*", help="suites, tests or ids as --list shows them; shell patterns (default: all)")
    add("--list", action="store_true", help="name the tests instead of running them")
    _add_on(parser)
    add("--type", choices=TYPES, help="only tests of this VM type")
    add(
        "--dialect",
        choices=(*DIALECTS, *TESTED_DIALECTS),
        metavar="D",
        help=f"only tests of this dialect (mainline, {', '.join(TESTED_DIALECTS)})",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ktap", action="store_true", help="KTAP on stdout, for kselftest, LAVA, KernelCI")
    form.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add("--junit", metavar="FILE", help="write JUnit XML too")
    add("-j", "--jobs", type=values.jobs, metavar="N", help="processes at a time (default: one per CPU; 0: in this process)")
    text = "seconds until a test is killed (default: what the test says, else 30; 0: no limit)"
    add("--timeout", type=values.timeout, default=argparse.SUPPRESS, metavar="S", help=text)


def _add_completion(verbs: Any) -> None:
    def run(options: argparse.Namespace) -> int:
        from vmm.cli import completion

        return completion.run(options)

    parser = _verb(verbs, "completion", run, 'print a completion script: eval "$(sevmm completion bash)"')
    parser.add_argument("shell", choices=["bash", "zsh"])


def _dialect(text: str) -> str:
    if text in DIALECTS:
        return text
    if text in TESTED_DIALECTS:
        raise argparse.ArgumentTypeError(f"the bundled guests speak mainline; for {text!r} see sevmm selftest --dialect {text}")
    if text in LATER_DIALECTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not built yet; only mainline is")
    raise argparse.ArgumentTypeError(f"{text!r} is no dialect (known: mainline)")


GUEST_COMPLETION = {"bash": "_sevmm_guests", "zsh": "_sevmm_guests"}
"""Names of the shell functions that completion.py defines."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse without running; for tests and for tools that take the same options."""
    return build_parser().parse_args(argv)
