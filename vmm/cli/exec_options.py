"""The grammar of `sevmm exec`. Everything behind the options, or behind `--`, is the program's and is not looked at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from vmm.cli import values

_EXAMPLES = """\
examples:
  sevmm exec -- ./sev_smoke_test                   one of the kernel's own tests, on a machine without SEV
  sevmm exec --platform sev,asids=4 -- ./my-vmm    SEV without SEV-ES, and room for four guests
  sevmm exec --record calls.jsonl -- ./my-vmm      every KVM and SEV call, decoded, one JSON object per line
  sevmm exec --verbose -- ./my-vmm                 why does it behave so? What it opens, makes and asks for in vain
  sevmm exec -- gdb --args ./my-vmm                the program under a debugger
  sevmm exec --fallthrough -- make check           plain VMs on the real /dev/kvm, the other types on the model

exit status: the program's own (128 + N: it died of signal N); 127 not found, 126 not executable, 2 usage, 70 the supervisor failed,
4 this host cannot. docs/exec.md says how it works and what it needs."""


def add(verb: Callable[..., argparse.ArgumentParser], verbs: Any, dialects: Sequence[str]) -> None:
    """Add the verb to `verbs`; `verb` is the parser's function that makes one."""

    def run(options: argparse.Namespace) -> int:
        from vmm.cli import exec as exec_verb

        return exec_verb.run(options)

    parser = verb(verbs, "exec", run, "run an unmodified program whose /dev/kvm and /dev/sev are the model", _EXAMPLES)
    parser.usage = "sevmm exec [OPTION...] [--] PROGRAM [ARG...]"
    option = parser.add_argument
    option("--platform", type=_machine, default="sev-es", metavar="P", help=_platform_help())
    option("--dialect", choices=dialects, default="mainline", metavar="D", help=f"whose interface of private memory: {', '.join(dialects)}")
    option("--fallthrough", action="store_true", help="plain VMs use the machine's own /dev/kvm; only the other types are the model's")
    option("--cpuid", choices=("model", "host"), default="model", metavar="C", help="whose CPUID the program itself sees: model or host")
    record = option("--record", metavar="FILE", help="write each call on these devices, decoded, as a line of JSON (docs/exec.md)")
    record.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # type: ignore[attr-defined]  # shtab's convention
    option("--record-limit", type=values.size, metavar="SIZE", help="stop recording at this size (default: 256M)")
    option(
        "--verbose",
        action="store_true",
        help="say on stderr what the program opens, makes and asks for in vain, and how each KVM_RUN ended",
    )
    words = option("words", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program, found as a shell finds it, and its arguments")
    words.complete = {"bash": "_sevmm_program", "zsh": "_sevmm_program"}  # type: ignore[attr-defined]


def _platform_help() -> str:
    return (
        "the machine that the program finds: sev-es (default: SEV and SEV-ES), sev, none; settings on top: asids=N, min-sev-asid=N"
        " (those below it are for SEV-ES), debug-swap=on, memlock=on"
    )


def _machine(text: str) -> object:
    from vmm.exec.options import machine

    try:
        return machine(text)
    except ValueError as refusal:
        raise argparse.ArgumentTypeError(str(refusal)) from None
