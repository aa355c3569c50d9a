"""sev_migrate_tests: a SEV guest moves from one VM to another on the same host, or is mirrored into a second one.

All VMs are of type 0 and were initialised with KVM_SEV_INIT or KVM_SEV_ES_INIT; a guest has four vCPUs and is in LAUNCH_UPDATE. The cases
of the kernel's test for SEV-SNP are not here: that is a VM type this project does not have.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EINVAL, EIO

from kvmapi.abi import caps
from kvmapi.abi import sev as s
from kvmapi.errors import KvmError
from kvmapi.launch import guest_status
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from vmm.selftests.api import Case, Subtest, check_result, expect_errno, runs_on, skip
from vmm.selftests.sev_vms import SevGuest, op

COPY, MOVE = caps.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, caps.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
VCPUS, TARGETS, THREADS = 4, 3, 3
ITERATIONS, ON_THE_MODEL = 10_000, 3_000  # the model's locks are Python's: it takes no more to meet every order
COMMANDS = 104  # every id below KVM_SEV_NR_MAX
FOR_MIRRORS = (s.KVM_SEV_LAUNCH_UPDATE_VMSA, s.KVM_SEV_GUEST_STATUS, s.KVM_SEV_DBG_DECRYPT, s.KVM_SEV_DBG_ENCRYPT)
PATIENCE = 60.0


class Vms:
    """Makes the VMs of a test, and closes them at its end."""

    def __init__(self, system: System, stack: ExitStack) -> None:
        self.system = system
        self._stack = stack
        self.platform = stack.enter_context(SevPlatform(system.host))

    def guest(self, es: bool = False) -> SevGuest:
        """A VM with a guest that is being launched."""
        made = self._keep(SevGuest(self.system, self.platform, es=es)).init().add_vcpus(VCPUS)
        return made.start(s.SEV_POLICY_ES if es else 0)

    def aux(self, vcpus: int = 0) -> SevGuest:
        """A VM that a guest may come to."""
        return self._keep(SevGuest(self.system, self.platform)).add_vcpus(vcpus)

    def without_vmsa(self) -> SevGuest:
        """An SEV-ES VM whose one vCPU was never measured."""
        return self._keep(SevGuest(self.system, self.platform, es=True)).init().add_vcpus(1, first=1)

    def _keep(self, guest: SevGuest) -> SevGuest:
        self._stack.callback(guest.close)
        return guest


@contextmanager
def vms(system: System) -> Iterator[Vms]:
    """The factory; skips where encryption contexts cannot be shared."""
    for name, cap in (("KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM", MOVE), ("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM", COPY)):
        if not system.check_extension(cap):
            skip(f"this KVM lacks {name}; use a kernel from 5.16 on, or --on model")
    with ExitStack() as stack:
        yield Vms(system, stack)


def has_es(system: System) -> bool:
    """Whether SEV-ES guests can be had."""
    return bool(system.check_extension(caps.KVM_CAP_VM_TYPES) >> 3 & 1)


@runs_on("sev", "sev-es")
def test_sev_migrate_from(system: System, case: Case) -> None:
    """From VM to VM to VM; the first, given up, takes nothing back: it is dead."""
    with vms(system) as make:
        source = make.guest(case.type == "sev-es")
        chain = [source, *(make.aux(VCPUS) for _ in range(TARGETS))]
        for giver, taker in itertools.pairwise(chain):
            taker.share(MOVE, giver)
        with expect_errno(EIO):
            source.share(MOVE, chain[-1])


@runs_on("sev")
def test_sev_migrate_locking(system: System) -> None:
    """Three VMs pull at each other without end: whatever the answers, nobody waits for ever."""
    with vms(system) as make:
        guests = [make.guest() for _ in range(THREADS)]

        def pull(taker: SevGuest) -> None:
            for number in range(ON_THE_MODEL if system.host.name == "model" else ITERATIONS):
                try:
                    taker.share(MOVE, guests[number % THREADS])
                except KvmError:
                    pass  # who has a guest can take none; only the locks are tested

        threads = [threading.Thread(target=pull, args=(guest,), daemon=True) for guest in guests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a deadlock"


@runs_on("sev")
def test_sev_migrate_parameters(system: System, subtest: Subtest) -> None:
    """What cannot be moved, and whereto."""
    with vms(system) as make:
        empty = make.aux()
        with subtest("from a VM without SEV"), expect_errno(EINVAL):
            empty.share(MOVE, make.aux(VCPUS))
        if not has_es(system):
            skip("this KVM does not offer VM type sev-es")
        sev, es, no_vmsa = make.guest(), make.guest(es=True), make.without_vmsa()
        for name, taker, giver in (
            ("from SEV-ES to a SEV VM", sev, es),
            ("from SEV to an SEV-ES VM", es, sev),
            ("from SEV-ES to a VM without vCPUs", empty, es),
            ("from SEV-ES before LAUNCH_UPDATE_VMSA", empty, no_vmsa),
            ("the same, to as many vCPUs", make.aux(1), no_vmsa),
        ):
            with subtest(name), expect_errno(EINVAL):
                taker.share(MOVE, giver)


@runs_on("sev")
def test_sev_move_copy(system: System, subtest: Subtest) -> None:
    """Owner and mirror move independently and go in any order."""
    with vms(system) as make:
        with subtest("owners destroyed first"):
            owners, mirrors = family(make, 4)
            for mirror, owner in ((0, None), (None, 0), (None, 1), (1, None), (2, None), (None, 2)):
                step(mirrors, mirror)
                step(owners, owner)
            for guest in (owners[1], owners[0], owners[2], owners[3], *mirrors):
                guest.close()
        with subtest("mirrors destroyed first"):
            owners, mirrors = family(make, 2)
            step(mirrors, 0)
            step(owners, 0)
            for guest in (*mirrors, owners[1], owners[0]):
                guest.close()
        assert make.platform.status().guest_count == 0, "the firmware still holds a guest"


def family(make: Vms, count: int) -> tuple[list[SevGuest], list[SevGuest]]:
    """A guest with the VMs it may move to, and its mirror with those of the mirror."""
    owners = [make.guest(), *(make.aux(VCPUS) for _ in range(count - 1))]
    mirrors = [make.aux() for _ in range(count)]
    mirrors[0].share(COPY, owners[0])
    return owners, mirrors


def step(line: list[SevGuest], at: int | None) -> None:
    """Move the guest that is in `line[at]` on to the next VM."""
    if at is not None:
        line[at + 1].share(MOVE, line[at])


@runs_on("sev", "sev-es")
def test_sev_mirror(system: System, case: Case, subtest: Subtest) -> None:
    """A mirror gets vCPUs of its own, and may ask and debug but neither launch nor send."""
    es = case.type == "sev-es"
    with vms(system) as make:
        source, mirror = make.guest(es), make.aux()
        mirror.share(COPY, source)
        mirror.add_vcpus(VCPUS)
        if es:
            mirror.command(s.KVM_SEV_LAUNCH_UPDATE_VMSA)
        for command in range(COMMANDS):
            if command in FOR_MIRRORS:
                continue
            with subtest(s.COMMAND_NAMES.get(command, f"command {command}")):
                result, _ = op(mirror.vm, command, None, make.platform.fd)
                check_result(result, -EINVAL, "the command on a mirror")
        with subtest("KVM_SEV_GUEST_STATUS"):
            assert guest_status(mirror.vm) == guest_status(source.vm), "a mirror shows another guest than its source"


@runs_on("sev")
def test_sev_mirror_parameters(system: System, subtest: Subtest) -> None:
    """What cannot be mirrored, and whereto."""
    with vms(system) as make:
        sev, with_vcpus, empty = make.guest(), make.aux(VCPUS), make.aux()
        pairs = [
            ("to itself", sev, sev),
            ("from a VM without SEV", empty, with_vcpus),
            ("to a VM with vCPUs", with_vcpus, sev),
        ]
        if has_es(system):
            es = make.guest(es=True)
            pairs += [("from SEV-ES to a SEV VM", sev, es), ("from SEV to an SEV-ES VM", es, sev)]
        for name, taker, giver in pairs:
            with subtest(name), expect_errno(EINVAL):
                taker.share(COPY, giver)
