"""Facts of SEV's own: how many guests the host has ASIDs for, and what the security processor says of itself.

Asked are the misc cgroup (`misc.capacity`, filled by kvm_amd with the ASIDs of each kind) and SEV_PLATFORM_STATUS, which changes nothing
and needs no writable /dev/sev. Where neither is there, the facts are unknown: `cpu-sev` and `dev-sev` have the reason.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmapi.abi import psp
from kvmapi.remedies import Remedy
from kvmapi.words_sev import FIRMWARE
from vmm.facts import NO, OK, UNKNOWN, Fact, Surroundings, errno_words

if TYPE_CHECKING:
    from kvmapi.host import Host

CGROUP = "/sys/fs/cgroup"
OLDEST_API = (0, 17)
"""Before this API (AMD's and virtee's tools) neither measurement nor secrets are bound to the firmware's version and the launch."""

_KINDS = {"sev": ("SEV guests at once", Remedy.ASIDS_SEV), "sev-es": ("SEV-ES guests at once", Remedy.ASIDS_SEV_ES)}


def gather(where: Surroundings) -> list[Fact]:
    """All facts of this file."""
    return [asids(where, "sev"), asids(where, "sev-es"), firmware(where.open_kernel)]


def asids(where: Surroundings, kind: str) -> Fact:
    """ASIDs for guests of a `kind` ("sev", "sev-es"), and how many are taken, from the misc cgroup of the whole machine."""
    title, remedy = _KINDS[kind]
    name, key = f"{kind}-asids", kind.replace("-", "_")
    capacity, taken = _misc(where, "misc.capacity").get(key), _misc(where, "misc.current").get(key, 0)
    if capacity is None:
        return Fact(name, title, UNKNOWN, f"{CGROUP}/misc.capacity does not name {key}")
    evidence = f"{CGROUP}/misc: {capacity} ASIDs of {key}, {taken} taken"
    return Fact(name, title, OK, evidence) if taken < capacity else Fact(name, title, NO, evidence, remedy)


def firmware(open_host: Callable[[], Host]) -> Fact:
    """SEV_PLATFORM_STATUS of /dev/sev: API version, build, state, owner, guests."""
    title = "SEV firmware"
    try:
        host = open_host()
        fd = host.open("/dev/sev", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ImportError) as error:
        words = errno_words(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        return Fact("sev-firmware", title, UNKNOWN, f"open /dev/sev: {words}")
    status = psp.sev_user_data_status()
    argument = psp.sev_issue_cmd(cmd=psp.SEV_PLATFORM_STATUS, data=ctypes.addressof(status), error=psp.SEV_RET_NO_FW_CALL)
    try:
        answer = host.ioctl(fd, psp.SEV_ISSUE_CMD, ctypes.addressof(argument))
    finally:
        host.close(fd)
    if answer < 0:
        said = errno_words(-answer)
        if argument.error in psp.RET_NAMES and argument.error not in (psp.SEV_RET_SUCCESS, psp.SEV_RET_NO_FW_CALL):
            words, remedy = FIRMWARE[argument.error]
            return Fact("sev-firmware", title, NO, f"SEV_PLATFORM_STATUS: {said}, {psp.RET_NAMES[argument.error]} ({words})", remedy)
        return Fact("sev-firmware", title, NO, f"SEV_PLATFORM_STATUS: {said}", Remedy.CCP)
    state = psp.PLATFORM_STATE_NAMES.get(status.state, f"state {status.state}")
    owner = "externally owned" if status.flags & psp.SEV_STATUS_FLAGS_OWNED else "self-owned"
    es = ", SEV-ES set up" if status.flags & psp.SEV_STATUS_FLAGS_CONFIG_ES else ""
    evidence = f"SEV_PLATFORM_STATUS: API {status.api_major}.{status.api_minor} build {status.build}, {state}, {owner}{es}"
    evidence += f", {status.guest_count} guests"
    if (status.api_major, status.api_minor) < OLDEST_API:
        old = f"older than API {OLDEST_API[0]}.{OLDEST_API[1]}: measurement and secrets are not bound to version and launch"
        return Fact("sev-firmware", title, NO, f"{evidence}; {old}", Remedy.FIRMWARE)
    return Fact("sev-firmware", title, OK, evidence)


def _misc(where: Surroundings, name: str) -> dict[str, int]:
    """The lines of a file of the root misc cgroup: resource and number; what is no number ("max") is left out."""
    pairs = (line.split() for line in (where.read(f"{CGROUP}/{name}") or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
