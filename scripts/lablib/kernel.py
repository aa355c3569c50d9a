"""The lab's kernel, built outside the source tree; make goes on where an interrupted build stopped.

The key is over the source's name and version and the whole preset. The compiler is not part of it: another compiler makes another file, not
another KVM.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

from lablib import kconfig, source
from lablib.cache import Result, Step, remove
from lablib.words import Failure, Progress, run_logged, say

KEPT = ("bzImage", "config")


def kernel_step(resolved: Result) -> Step:
    """The build of this source with the present options."""
    return Step("kernel", 1, {"package": str(resolved["package"]), "version": str(resolved["version"]), "preset": kconfig.preset()})


def build(resolved: Result) -> Step:
    """Make sure that the kernel is there; gives its step."""
    step = kernel_step(resolved)
    step.run(functools.partial(_build, step, resolved))
    return step


def make_command(tree: Path, output: Path, *words: str) -> list[str]:
    """make in `tree` with everything it makes in `output`, politely, on all processors."""
    return ["nice", "-n", "10", "make", "-C", str(tree), f"O={output}", f"-j{os.cpu_count() or 1}", *words]


def _build(step: Step, resolved: Result, progress: Progress) -> Result:
    tree = source.tree(resolved)
    output = step.directory / "build"
    output.mkdir(exist_ok=True)
    if not (output / ".config").exists():
        preset = step.directory / "preset"
        preset.write_text(kconfig.preset())
        try:
            run_logged([*make_command(tree, output), f"KCONFIG_ALLCONFIG={preset}", "allnoconfig"], step.log, progress)
        except BaseException:
            remove(output / ".config")
            raise
    essential, others = kconfig.not_taken((output / ".config").read_text())
    if essential:
        remove(output)
        raise Failure(f"{resolved['package']} {resolved['version']} cannot be configured with {', '.join(essential)}")
    if others:
        say(f"{step.name}: this source leaves out {', '.join(others)}")
    progress.update("compiling")
    run_logged(make_command(tree, output, "bzImage"), step.log, progress, count=r"^  (CC|AS|AR|LD|HOSTCC) ", unit="files")
    shutil.copyfile(output / "arch/x86/boot/bzImage", step.directory / "bzImage")
    shutil.copyfile(output / ".config", step.directory / "config")
    remove(output)
    return {"image_bytes": (step.directory / "bzImage").stat().st_size, "left_out": others}
