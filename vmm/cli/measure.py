"""`sevmm measure GUEST`: what a launch would measure, without opening any device; `--verify` compares a launch with it.

The text shows each region and each VMSA with its hash, then the digest, and the MAC where key, nonce and firmware version are
known. `--json` prints the object that `--save` writes (`vmm.saved_launch`); with `--verify` it prints the verdict instead:
{same, difference, settings, mac}, where `mac` is null if it was not checked.

Exit status: 0, and with `--verify` 0 for the same and 1 for a difference or a wrong MAC; 2 usage, 4 no compiler for a bundled guest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vmm.cli import status
from vmm.cli.style import Style
from vmm.cli.summary import policy_words
from vmm.cli.values import show_size

if TYPE_CHECKING:
    from vmm.measure import Answer, Measurement

DIFFERS = 1
_TIK_SIZE = 16
_FIELDS_WIDTH = 108


class _Usage(Exception):
    """What was asked for makes no sense; one sentence."""


def run(options: argparse.Namespace) -> int:
    """Predict, and print, save or compare; the exit status of the process."""
    from vmm.config import ConfigError
    from vmm.image import ImageError
    from vmm.run import Refused
    from vmm.rungs import Unsupported
    from vmm.saved_launch import SavedLaunchError

    try:
        return _run(options)
    except (_Usage, Refused, ImageError, ConfigError, SavedLaunchError) as refusal:
        return _fail(options, str(refusal), status.USAGE)
    except Unsupported as answer:
        return _fail(options, str(answer), status.UNSUPPORTED)


def _fail(options: argparse.Namespace, text: str, code: int) -> int:
    text = " ".join(text.split())
    print(f"sevmm: {text}" if options.guest in text else f"sevmm: {options.guest}: {text}", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from vmm import saved_launch
    from vmm.measure import Answer

    tik = _check(options)
    if options.save is not None:
        saved_launch.check_target(options.save)
    found = None if options.verify is None else saved_launch.load(options.verify)
    expected = _predict(options)
    mac = None if tik is None or found is not None else expected.mac(tik, options.nonce, (*options.api, options.build))
    if mac is not None:
        expected = replace(expected, answer=Answer((*options.api, options.build), options.nonce, mac))
    if options.save is not None:
        saved_launch.save(expected, options.save)
    if found is not None:
        return _verify(options, expected, found, tik)
    if options.json:
        print(saved_launch.dumps(expected))
    else:
        print("\n".join(_lines(options, expected, mac, Style(sys.stdout))))
    return status.OK


def _check(options: argparse.Namespace) -> bytes | None:
    """The integrity key, if there is one; options that need each other."""
    given = [f"--{name}" for name in ("nonce", "api", "build") if getattr(options, name) is not None]
    if options.tik is None:
        if given:
            raise _Usage(f"{', '.join(given)} without --tik: only the owner's integrity key makes a MAC")
        return None
    if options.verify is None and len(given) < 3:
        raise _Usage("the MAC needs all of --tik, --nonce, --api and --build (sevmm platform status has the last two)")
    try:
        with open(options.tik, "rb") as file:
            tik = file.read(_TIK_SIZE + 1)
    except (OSError, ValueError) as failure:
        raise _Usage(f"the key {options.tik} cannot be read: {(getattr(failure, 'strerror', None) or str(failure)).lower()}") from failure
    if len(tik) != _TIK_SIZE:
        raise _Usage(f"the key {options.tik} has not the {_TIK_SIZE} bytes of an integrity key")
    return tik


def _predict(options: argparse.Namespace) -> Measurement:
    """The prediction for what the options say; a note where `run` would not run that."""
    from vmm.config import MachineConfig
    from vmm.launch import default_policy
    from vmm.measure import Setup, predict
    from vmm.run import find_guest, load_guest

    row = find_guest(options.guest)
    image = load_guest(options.guest, row)
    policy = default_policy(options.type) if options.policy is None else options.policy
    arguments = options.arguments.encode(errors="surrogateescape")
    MachineConfig(image=image, type=options.type, memory=options.memory, vcpus=options.vcpus, policy=policy, arguments=arguments).check()
    if row is not None and options.type not in row.types:
        print(f"sevmm: note: the guest {row.name} does not run on type {options.type}; only its launch is predicted", file=sys.stderr)
    setup = Setup(
        options.guest, options.type, policy, options.memory, options.vcpus, arguments, options.init, options.c_bit, options.features
    )  # fmt: skip
    return predict(setup, image)


# -- a prediction ------------------------------------------------------------------------------------------------------------------------


def _lines(options: argparse.Namespace, what: Measurement, mac: bytes | None, style: Style) -> Iterator[str]:
    def row(key: str, text: str) -> str:
        return f"{style.paint(f'{key:<11}', 'dim')} {text}"

    setup = what.setup
    how = {("sev", "init"): "KVM_SEV_INIT", ("sev-es", "init"): "KVM_SEV_ES_INIT"}.get((setup.type, setup.init), "KVM_SEV_INIT2")
    yield row("guest", f"{style.paint(setup.guest, 'bold')}, type {setup.type}, {how}")
    yield row("host", f"C-bit {setup.c_bit}, boot info features {setup.features:#x} (assumed: --c-bit, --features)")
    yield row("launch", f"policy {setup.policy:#x}{policy_words(setup.policy)}")
    regions = what.regions or ()
    digits = max(6, *(len(f"{region.gpa + region.size:x}") for region in regions))
    for number, region in enumerate(regions):
        place = f"[0x{region.gpa:0{digits}x}, 0x{region.gpa + region.size:0{digits}x})"
        yield row("" if number else "regions", f"{place}  {show_size(region.size):>7}  {region.sha256.hex()}  {region.name}")
    for number, area in enumerate(what.vmsas or ()):
        yield row("" if number else "vmsas", f"vCPU {area.vcpu}  {area.sha256.hex()}")
        yield from (" " * 14 + line for line in _fields(area.fields, (what.vmsas or (area,))[0].fields if number else {}))
    yield row("digest", style.paint(what.digest.hex(), "bold"))
    if mac is not None:
        version = f"API {options.api[0]}.{options.api[1]} build {options.build}"
        yield row("measure", f"{mac.hex()}  (for nonce {options.nonce.hex()}, {version})")


def _fields(fields: Mapping[str, int], first: Mapping[str, int]) -> list[str]:
    """The non-zero fields of a VMSA, of later ones what is not as in the first; as many on a line as fit."""
    lines = ["as vCPU 0, but" if first else ""]
    for name in (*fields, *(name for name in first if name not in fields)):
        value = fields.get(name, 0)
        if first and value == first.get(name, 0):
            continue
        word = f"{name}={value:#x}"
        if lines[-1] and len(lines[-1]) + 2 + len(word) > _FIELDS_WIDTH:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    return lines


# -- a comparison ------------------------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace, expected: Measurement, found: Measurement, tik: bytes | None) -> int:
    from vmm.measure import compare, setup_differences

    difference = compare(expected, found)
    # The output of `run --json` does not say how the guest was set up: nothing to compare, and nothing to advise.
    settings = setup_differences(expected.setup, found.setup) if difference is not None and found.regions is not None else []
    mac = None if tik is None else _mac(options, expected, found.answer, tik)
    same = difference is None and mac is not False
    if options.json:
        print(json.dumps({"same": same, "difference": difference, "settings": settings, "mac": mac}))
    else:
        print("\n".join(_verdict(options, expected, found, difference, settings, mac, Style(sys.stdout))))
    return status.OK if same else DIFFERS


def _mac(options: argparse.Namespace, expected: Measurement, answer: Answer | None, tik: bytes) -> bool:
    """Whether the firmware's MAC in the file is the one of our own digest."""
    from kvmapi.measurement import same

    if answer is None:
        raise _Usage(f"{options.verify} has no firmware's answer, so there is no MAC to check with --tik")
    version = answer.version
    if options.api is not None and options.build is not None:
        version = (*options.api, options.build)
    if version is None:
        raise _Usage(f"{options.verify} does not say which firmware answered: add --api and --build (sevmm platform status has them)")
    return same(answer.measure, expected.mac(tik, options.nonce or answer.nonce, version))


def _verdict(
    options: argparse.Namespace,
    expected: Measurement,
    found: Measurement,
    difference: str | None,
    settings: list[str],
    mac: bool | None,
    style: Style,
) -> Iterator[str]:
    what = "launch" if found.kind == "launch" else "prediction"
    if difference is None:
        verdict = style.paint("same", "green")
        yield f"{verdict}: {options.verify} is a {what} of what {options.guest} should be, digest {expected.digest.hex()}"
    else:
        yield f"{style.paint('differs', 'red')}: {difference}"
    yield from (f"  {line}" for line in settings)
    if mac is not None:
        right = style.paint("right", "green") if mac else style.paint("WRONG", "red")
        why = "the firmware that has this key measured exactly that" if mac else "another digest, key, nonce, policy or firmware version"
        yield f"MAC {right}: {why}"
    elif found.answer is not None and difference is None:
        yield "the firmware's MAC was not checked: a session's owner does that with --tik FILE (sevmm run checks its own, and keeps no key)"
