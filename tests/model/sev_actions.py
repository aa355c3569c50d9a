"""What a VMM does with one VM: each action takes the world and a few small numbers, and 0 for all of them is the plainest call.

An action builds the struct of a call that is right, with what its numbers say is wrong, and lets the world make the call and judge it.
"""

from __future__ import annotations

import hashlib

from kvmapi.abi import sev as s
from tests.model.sev_arena import GUEST, PAGE
from tests.model.sev_twist import STRAIGHT, Twist
from tests.model.sev_world import POLICIES, Broken, World

TWIST = 36
SIZES = (16, 32, PAGE, 64, 48, 2 * PAGE, 4064, GUEST, 8, 17, 1, 4095)
PLACES = (0, 16, PAGE, PAGE - 16, 2 * PAGE, 3 * PAGE, PAGE - 48, 8, 4090, 3 * PAGE + 4080, 1)


def twist(number: int, value: int) -> Twist:
    """Most calls are straight; the others have one of twelve fields wrong."""
    return STRAIGHT if number < TWIST - 11 else Twist(number - TWIST + 12, value)


def create(w: World, type: int) -> None:
    w.create_vm((2, 3, 0, 2, 3, 0)[type])


def ready(w: World, es: int, policy: int, how: int) -> None:
    """A VM that is launched as far as `how` says, by a sequence of calls that are right."""
    w.create_vm((2, 3)[es])
    number = len(w.fds) - 1
    vm = w.vm(number)
    if vm.active or vm.dead or vm.vcpus:
        return
    w.command(vm, s.KVM_SEV_INIT2, s.kvm_sev_init())
    if es:
        vcpu(w, number)
    for step in (start, update, vmsa, measure, finish)[: how + 1]:
        step(w, number, policy) if step is start else step(w, number)


def close(w: World, number: int) -> None:
    w.close_vm(w.vm(number))


def vcpu(w: World, number: int) -> None:
    w.create_vcpu(w.vm(number))


def run(w: World, number: int) -> None:
    w.run(w.vm(number))


def initialise(w: World, number: int, how: int = 0, t: int = 0, v: int = 0) -> None:
    """INIT2, INIT, ES_INIT: the one that suits the VM, or another."""
    vm = w.vm(number)
    which = (s.KVM_SEV_INIT2, s.KVM_SEV_INIT, s.KVM_SEV_ES_INIT)
    suits = 1 if vm.type == 0 else 0
    w.command(vm, which[(suits + max(0, how - 3)) % 3], s.kvm_sev_init(), twist(t, v))


def start(w: World, number: int, policy: int = 0, owner: int = 0, fd: int = 0, flip: int = 0, t: int = 0, v: int = 0) -> None:
    """LAUNCH_START; the policy fits the VM unless the number is high. `owner`: with session, without, or half. `flip` spoils a byte."""
    vm = w.vm(number)
    bits = POLICIES[policy % len(POLICIES)]
    if policy < 2 * len(POLICIES):
        bits = bits & ~s.SEV_POLICY_ES | (s.SEV_POLICY_ES if vm.es else 0)
    given = s.kvm_sev_launch_start(policy=bits)
    if owner < 4:
        dh, session = bytearray(w.owner.dh), bytearray(w.owner.session(bits))
        if flip > 12:
            target, at = ((dh, 0), (dh, 0x14), (session, 0), (session, 40), (session, 70), (session, 127))[flip % 6]
            target[at] ^= 1
        if owner != 2:
            given.dh_uaddr, given.dh_len = w.blob(0, bytes(dh)), len(dh)
        if owner != 3:
            given.session_uaddr, given.session_len = w.blob(4, bytes(session)), len(session)
    if owner == 7 and w.ref.guests():
        given.handle = w.ref.guests()[0].handle  # to share its key
    w.command(vm, s.KVM_SEV_LAUNCH_START, given, twist(t, v), w.sev_fd(fd))


def update(w: World, number: int, place: int = 0, size: int = 2, t: int = 0, v: int = 0) -> None:
    vm = w.vm(number)
    place, size = PLACES[place % len(PLACES)], SIZES[size % len(SIZES)]
    address = w.guest_bytes(vm, place, size, number)
    w.command(vm, s.KVM_SEV_LAUNCH_UPDATE_DATA, s.kvm_sev_launch_update_data(address, min(size, GUEST - place)), twist(t, v))


def vmsa(w: World, number: int, t: int = 0, v: int = 0) -> None:
    w.command(w.vm(number), s.KVM_SEV_LAUNCH_UPDATE_VMSA, None, twist(t, v))


def measure(w: World, number: int, size: int = 0, t: int = 0, v: int = 0) -> None:
    given = s.kvm_sev_launch_measure(w.output(), (48, 48, 48, 64, 0, 47, 0x4000)[size])
    w.command(w.vm(number), s.KVM_SEV_LAUNCH_MEASURE, given, twist(t, v))


def finish(w: World, number: int, t: int = 0, v: int = 0) -> None:
    w.command(w.vm(number), s.KVM_SEV_LAUNCH_FINISH, None, twist(t, v))


def secret(w: World, number: int, place: int = 0, size: int = 0, wrong: int = 0, t: int = 0, v: int = 0) -> None:
    """LAUNCH_SECRET with a packet of the owner's. `wrong`: another guest's packet, a spoiled byte, another measurement, cut off."""
    vm = w.vm(number)
    place, size = PLACES[place % len(PLACES)], SIZES[size % len(SIZES)]
    size = min(size, PAGE)
    plain = hashlib.shake_128(f"secret {w.steps}".encode()).digest(size)
    keys = vm.guest.keys if vm.guest is not None and vm.guest.keys is not None else (bytes(16), bytes(16))
    about = vm.guest.measure if vm.guest is not None else b""
    others = [other.guest for other in w.open_vms if other.guest is not None and other.guest.keys and other.guest is not vm.guest]
    if wrong == 8 and others:
        keys, about = others[0].keys or keys, others[0].measure
    if wrong == 9:
        about = bytes(32)
    header, trans = map(bytearray, w.owner.packet(keys, plain, about or bytes(32)))
    if wrong in (10, 11):
        (header if wrong == 10 else trans)[-1] ^= 1
    if wrong == 12:
        header[0] ^= 1  # flags, which the MAC covers
    if wrong == 13:
        del trans[-16:]
    address = w.arena.guest[w.places[vm]] + place
    given = s.kvm_sev_launch_secret(
        hdr_uaddr=w.blob(0, bytes(header)), hdr_len=len(header), guest_uaddr=address, guest_len=size,
        trans_uaddr=w.blob(4, bytes(trans)), trans_len=len(trans),
    )  # fmt: skip
    w.command(vm, s.KVM_SEV_LAUNCH_SECRET, given, twist(t, v))
    if size >= 16 and any(plain[:16] in region for region in w.arena.snapshot()):
        raise Broken(f"{w.last}: the secret stands in memory that the VMM reads")


def status(w: World, number: int, t: int = 0, v: int = 0) -> None:
    w.command(w.vm(number), s.KVM_SEV_GUEST_STATUS, s.kvm_sev_guest_status(), twist(t, v))


def report(w: World, number: int, size: int = 0, t: int = 0, v: int = 0) -> None:
    given = s.kvm_sev_attestation_report(uaddr=w.output(), len=(208, 208, 0, 207, 300, 0x4000)[size])
    given.mnonce[:] = hashlib.md5(str(w.steps).encode(), usedforsecurity=False).digest()
    w.command(w.vm(number), s.KVM_SEV_GET_ATTESTATION_REPORT, given, twist(t, v))


def debug(w: World, number: int, encrypt: int = 0, source: int = 0, place: int = 0, size: int = 0, t: int = 0, v: int = 0) -> None:
    """DBG_DECRYPT of guest memory into a buffer, DBG_ENCRYPT of a buffer into guest memory, or (high `source`) of memory onto itself."""
    vm = w.vm(number)
    place, size = PLACES[place % len(PLACES)], SIZES[size % len(SIZES)]
    guest = w.arena.guest[w.places[vm]] + place
    other = w.output() + PLACES[source % 11] % PAGE if source < 11 else w.arena.guest[w.places[vm]] + PLACES[source - 11]
    if encrypt and source < 11:
        w.arena.write(other, hashlib.shake_128(f"debug {w.steps}".encode()).digest(min(size, 2 * PAGE)))
    given = s.kvm_sev_dbg(other, guest, size) if encrypt else s.kvm_sev_dbg(guest, other, size)
    w.command(vm, s.KVM_SEV_DBG_ENCRYPT if encrypt else s.KVM_SEV_DBG_DECRYPT, given, twist(t, v))


def region(w: World, number: int, what: int, page: int, size: int, t: int = 0, v: int = 0) -> None:
    """REG_REGION, UNREG_REGION of anything, or (2, 3) of what is or was registered."""
    vm, here = w.vm(number), w.arena.guest
    known = [(address - here[w.places[vm]], length) for address, length in vm.regions]
    if what > 1 and known:
        at, length = known[page % len(known)]
        if 0 <= at < GUEST and not at % PAGE:
            w.region(vm, at // PAGE, length, False)
        return
    size = min((PAGE, 1, 2 * PAGE, GUEST)[size], GUEST + PAGE - page * PAGE)  # a hole at the end, never in the middle
    w.region(vm, page, size, not what, twist(t, v))


def unknown(w: World, number: int, which: int, t: int, v: int) -> None:
    """Ids that KVM has names for and no command, SNP's, and none."""
    ids = (10, 14, 19, 23, 99, 104, 0xFFFF_FFFF, 100, 101, 102, 103)
    w.command(w.vm(number), ids[which], None, twist(t, v))


def keys(w: World, what: int) -> None:
    w.new_keys(what)


def limit(w: World, how: int) -> None:
    """RLIMIT_MEMLOCK: none, or a few pages."""
    w.limit((None, 12, 3, 1)[how])


def device(w: World, number: int, close: int) -> None:
    w.sev_device(number, close == 2)
