"""What of the lab is there, what is missing, and what to do about it. Looks only at files and PATH: no network, no building.

`ready` is the answer for tests and CI: kernel and QEMU are there, and the first process is compiled or can be in a second. The source and
its tree are not needed any more by then; the selftests are a thing of their own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lablib import initrd, kernel, packages, selftests, source
from lablib.cache import Step, cache_root, size_of

SETUP = "scripts/lab setup"


@dataclass(frozen=True)
class Item:
    """One part: `state` is ready, missing, partial (an interrupted attempt that setup resumes) or unneeded."""

    name: str
    state: str
    detail: str = ""
    key: str | None = None
    path: str | None = None
    bytes: int = 0
    needed: bool = True
    remedy: str | None = None


def items() -> list[Item]:
    """Every part, in the order in which setup makes them."""
    found = [_packages()]
    resolve = source.resolve_step()
    resolved = resolve.result()
    if resolved is None:
        detail = "which source is not known yet"
        found.append(Item("resolve", _state(resolve), detail, resolve.key, str(resolve.directory), remedy=SETUP))
        found += [Item(name, "missing", "", needed=name == "kernel", remedy=SETUP) for name in ("source", "kernel", "selftests")]
    else:
        found.append(_item(resolve, f"{resolved.get('package')} {resolved.get('version')}"))
        built = kernel.kernel_step(resolved)
        fetched = source.source_step(resolved)
        tree = fetched.directory / "tree"
        have_kernel = built.result() is not None
        if fetched.result() is not None or not have_kernel:
            found.append(_item(fetched, "with its tree" if tree.exists() else "package only", needed=not have_kernel))
        else:
            found.append(Item("source", "unneeded", "the kernel is built", fetched.key, str(fetched.directory), needed=False))
        found.append(_item(built))
        found.append(_item(selftests.selftests_step(resolved), needed=False, remedy="scripts/lab selftests"))
    found.append(_init())
    return found


def ready(parts: list[Item]) -> bool:
    return all(part.state in {"ready", "unneeded"} for part in parts if part.needed)


def why_not(parts: list[Item]) -> str:
    """One sentence with the remedy; empty when ready."""
    lacking = [part for part in parts if part.needed and part.state not in {"ready", "unneeded"}]
    if not lacking:
        return ""
    names = ", ".join(f"{part.name} ({part.detail or part.state})" for part in lacking)
    return f"the lab is not ready: {names}; get it: {lacking[0].remedy or SETUP}"


def as_json(parts: list[Item]) -> str:
    state = {"ready": ready(parts), "reason": why_not(parts) or None, "cache": str(cache_root())}
    return json.dumps({**state, "parts": [asdict(part) for part in parts]}, indent=2)


def as_text(parts: list[Item]) -> str:
    lines = []
    for part in parts:
        size = f"{part.bytes / (1 << 20):,.0f} MiB" if part.bytes >= 1 << 20 else ""
        lines.append(f"{part.name:<10} {part.state:<9} {size:>10}  {part.detail}".rstrip())
        if part.state in {"missing", "partial"} and part.remedy:
            lines.append(f"{'':<10} get it: {part.remedy}{'' if part.needed else ' (not needed to run)'}")
    lines.append(f"cache      {cache_root()}")
    lines.append(why_not(parts) or "the lab is ready")
    return "\n".join(lines)


def _state(step: Step) -> str:
    if step.result() is not None:
        return "ready"
    try:
        left = any(entry.name != "lock" for entry in step.directory.iterdir())
    except OSError:
        left = False
    return "partial" if left else "missing"


def _item(step: Step, detail: str = "", needed: bool = True, remedy: str = SETUP) -> Item:
    state = _state(step)
    words = detail if state == "ready" else ""
    path: Path = step.directory
    size = size_of(path) if path.exists() else 0
    return Item(step.name, state, words, step.key, str(path), size, needed, None if state == "ready" else remedy)


def _packages() -> Item:
    lacking = packages.missing("run")
    if lacking:
        return Item("packages", "missing", f"lacks {', '.join(lacking)}", remedy="scripts/lab setup --install")
    return Item("packages", "ready", "QEMU is installed")


def _init() -> Item:
    step = initrd.init_step()
    lacking = packages.missing("init")
    if step.result() is None and not lacking:
        return Item("init", "ready", "compiled when it is first needed", step.key, str(step.directory))
    item = _item(step)
    if item.state == "ready":
        return item
    return Item("init", item.state, f"lacks {', '.join(lacking)}", step.key, remedy="scripts/lab setup --install")
