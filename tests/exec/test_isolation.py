"""What a program under `sevmm exec` can learn about the process that answers it: nothing that the model knows."""

from __future__ import annotations

import pytest

from tests.exec.launching import Under

pytestmark = pytest.mark.model

FILES = ("mem", "maps", "environ", "auxv", "pagemap")
LOOK = f"""
grep -q vmm.cli /proc/$PPID/cmdline || echo this is not the supervisor
exec 3<>/dev/kvm                # it has loaded the model by now
for what in {" ".join(FILES)}; do
    if (: <"/proc/$PPID/$what") 2>/dev/null; then echo "$what opens"; else echo "$what refused"; fi
done
"""


def test_a_program_cannot_look_into_its_supervisor(anyone: tuple[str, ...]) -> None:
    """Both are the same user's."""
    done = Under("exec", before=anyone).run("sh", "-c", LOOK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for what in FILES for word in (what, "refused")]
