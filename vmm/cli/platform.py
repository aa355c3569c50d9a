"""`sevmm platform …`: who a platform is, who owns it, and whether somebody's chain of certificates holds.

What answers is the host's /dev/sev or the model; the first line of every answer says which and why. `verify` opens nothing:
an owner runs it on a machine of their own, with the files that a host's `export` gave.

Exit status: 0; 1 the firmware refused, or a link of the chain does not hold; 2 usage, or a file that cannot be read or
written; 4 this host cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from errno import EACCES, ENOENT, ENXIO, EPERM
from pathlib import Path
from typing import Any

from kvmapi import certificates as certs
from kvmapi.cert_chain import MISSING, SIGNATURE, Chain
from kvmapi.errors import HostError, KvmError
from kvmapi.sev import SevPlatform
from vmm import platform_files as files
from vmm import rungs
from vmm.cli import status
from vmm.cli.style import Style, is_terminal

REFUSED = 1


def run(options: argparse.Namespace) -> int:
    """Do what `options.action` says."""
    try:
        if options.action == "verify":
            return _verify(options)
        rung = rungs.choose_platform(options.on)
        with SevPlatform(rung.host) as platform:
            action: Callable[[argparse.Namespace, rungs.Rung, SevPlatform], int] = _ACTIONS[options.action]
            return action(options, rung, platform)
    except files.FileProblemError as problem:
        return _refuse(str(problem), status.USAGE)
    except rungs.Unsupported as refusal:
        return _refuse(str(refusal), status.UNSUPPORTED)
    except HostError as failure:
        return _refuse(str(failure), status.UNSUPPORTED)
    except KvmError as failure:
        cannot = failure.fw_error is None and failure.errno in (EPERM, EACCES, ENOENT, ENXIO)
        return _refuse(str(failure), status.UNSUPPORTED if cannot else REFUSED)


def _refuse(text: str, code: int) -> int:
    print(f"sevmm: {' '.join(text.split())}", file=sys.stderr)
    return code


def _answer(options: argparse.Namespace, rung: rungs.Rung, data: dict[str, Any], rows: list[tuple[str, str]]) -> int:
    """Print one answer: JSON with the rung in it, or the rung's line and the rows."""
    if options.json:
        print(json.dumps({"rung": rung.name, "rung_reason": rung.reason, **data}, indent=2))
        return status.OK
    style = Style(sys.stdout)
    for title, text in (("platform", f"{rung.name} ({rung.reason})"), *rows):
        print(f"{style.paint(f'{title:<10}', 'bold')}{text}".rstrip())
    return status.OK


# --- what the platform says ------------------------------------------------------------------------------------------


def _status(options: argparse.Namespace, rung: rungs.Rung, platform: SevPlatform) -> int:
    found, chip, kept = platform.status(), _chip_id(platform), rungs.kept_in(rung)
    data = {
        "api_major": found.api_major, "api_minor": found.api_minor, "build": found.build, "state": found.state_name,
        "owned": found.owned, "es": found.es, "guests": found.guest_count, "chip_id": chip, "kept_in": kept or None,
    }  # fmt: skip
    rows = [
        ("firmware", f"API {found.api_major}.{found.api_minor}, build {found.build}"),
        ("state", f"{found.state_name}, {found.guest_count} {'guest' if found.guest_count == 1 else 'guests'}"),
        ("owner", "somebody's OCA certificate was imported" if found.owned else "the platform itself"),
        ("SEV-ES", "initialised" if found.es else "not initialised"),
        ("chip id", chip or "this firmware gives none (needs API 0.16)"),
    ]
    if rung.name == "model":
        rows.append(("keys", kept or "end with this process"))
    return _answer(options, rung, data, rows)


def _chip_id(platform: SevPlatform) -> str | None:
    try:
        return platform.get_id().hex()
    except KvmError:
        return None


def _export(options: argparse.Namespace, rung: rungs.Rung, platform: SevPlatform) -> int:
    pdh, chain = platform.pdh_cert_export()
    amd = rungs.amd_certificates(rung)
    written = files.export_files(pdh, chain, amd)
    files.write(Path(options.directory), written, force=options.force)
    rows = [("wrote", f"{', '.join(written)} in {options.directory}")]
    chip = None if amd else _chip_id(platform)
    if not amd:
        rows.append(("missing", f"AMD's signature of cek.cert, ask.cert and ark.cert. AMD's key server (kdsintf.amd.com) has the signed CEK"
                     f" as /cek/id/{chip or 'CHIP_ID'}; AMD publishes ask_ark.cert per family"))  # fmt: skip
    return _answer(options, rung, {"directory": options.directory, "files": sorted(written), "chip_id": chip}, rows)


def _csr(options: argparse.Namespace, rung: rungs.Rung, platform: SevPlatform) -> int:
    target = Path(options.file)
    files.write(target.parent, {target.name: platform.pek_csr()}, force=options.force, make=False)
    rows = [("wrote", f"{target}: the owner signs it with the OCA key, then: sevmm platform import PEK OCA")]
    return _answer(options, rung, {"file": str(target)}, rows)


# --- what changes the platform ---------------------------------------------------------------------------------------


def _import(options: argparse.Namespace, rung: rungs.Rung, platform: SevPlatform) -> int:
    platform.pek_cert_import(files.read(Path(options.pek)), files.read(Path(options.oca)))
    rows = [("owner", f"the OCA of {options.oca} owns this platform now"), ("undo", "sevmm platform reset")]
    return _answer(options, rung, {"owned": True}, rows)


def _pdh_gen(options: argparse.Namespace, rung: rungs.Rung, platform: SevPlatform) -> int:
    platform.pdh_gen()
    rows = [("PDH", "a new key; sessions that owners made for the old one are worthless, new ones need a new export")]
    return _answer(options, rung, {"pdh": hashlib.sha256(platform.pdh_cert_export()[0]).hexdigest()}, rows)


def _reset(options: argparse.Namespace, rung: rungs.Rung, platform: SevPlatform) -> int:
    if not options.yes and not _confirmed(rung):
        return _refuse("nothing was reset: say --yes, or yes on a terminal", status.USAGE)
    platform.factory_reset()
    rows = [("reset", "new OCA, PEK and PDH; the platform owns itself, and no session or request made before is good any more")]
    return _answer(options, rung, {"reset": True}, rows)


def _confirmed(rung: rungs.Rung) -> bool:
    """Ask the person at the terminal; nobody there is a no."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return False
    print(f"The platform of the {rung.name} ({rung.reason}) forgets its owner and all keys but the chip's.", file=sys.stderr)
    print("Reset it? Type yes: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


# --- somebody's files ------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    chain = files.read_chain(Path(options.directory))
    links, (kind, words) = chain.links(), _root(chain)
    holds = all(link.ok for link in links)
    if options.json:
        named = [{"certificate": x.certificate, "signer": x.signer, "ok": x.ok, "fault": x.fault or None, "words": x.words} for x in links]
        root = {"kind": kind, "key_id": chain.root.hex() or None, "sha256": _fingerprint(chain), "words": words}
        print(json.dumps({"holds": holds, "links": named, "root": root}, indent=2))
    else:
        style = Style(sys.stdout)
        for link in links:
            verdict = style.paint("good", "green") if link.ok else style.paint("BAD ", "red")
            print(f"{link!s:<12}{verdict}  {_advice(link.certificate, link.fault, link.words)}".rstrip())
        print(f"{'root':<12}{words}")
        print(f"{'chain':<12}{style.paint('holds', 'green') if holds else style.paint('does not hold', 'red')}")
    return status.OK if holds else REFUSED


def _advice(certificate: str, fault: str, words: str) -> str:
    """The words of a link, and where the missing piece can be had."""
    if fault == MISSING and any(f"no {name} " in words for name in ("ASK", "ARK")):
        return f"{words}: AMD publishes ask_ark.cert per family"
    if fault == SIGNATURE and certificate == "CEK":
        return f"{words} (a firmware exports its CEK unsigned; AMD's key server has the signed one)"
    return words


def _fingerprint(chain: Chain) -> str | None:
    return hashlib.sha256(chain.ark).hexdigest() if chain.root else None


def _root(chain: Chain) -> tuple[str | None, str]:
    """Whose root it is, as far as that can be said: (kind, words)."""
    if not chain.root:
        return None, "there is no root certificate that can be read: nothing says whose chip this is"
    compare = f"compare it with AMD's published ARK (SHA-256 of this one: {_fingerprint(chain)})"
    if chain.root == certs.MODEL_ROOT_ID:
        return "model", "the software model's own (SEVMM MODEL ROOT): these keys are no AMD chip's, and only tests should trust them"
    family = certs.AMD_FAMILIES.get(chain.root)
    if family:
        return family.lower(), f"not the model's; its key id is that of AMD's {family} root, which anybody can write: {compare}"
    return "unknown", f"not the model's, and no family of AMD's that this program knows: {compare}"


_ACTIONS = {
    "status": _status, "export": _export, "csr": _csr, "import": _import, "pdh-gen": _pdh_gen, "reset": _reset,
}  # fmt: skip
