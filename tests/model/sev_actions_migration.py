"""What a VMM does with two VMs: sends a guest from one to the other, moves a context, mirrors it. 0 is plainest, as in sev_actions.py."""

from __future__ import annotations

from kvmapi.abi import sev as s
from tests.model.sev_actions import PLACES, SIZES, ready, twist
from tests.model.sev_reference_migration import Stream
from tests.model.sev_world import World


def send_start(w: World, number: int, flip: int = 0, size: int = 0, t: int = 0, v: int = 0) -> None:
    """SEND_START to this same platform; `flip` spoils a byte of a certificate that is signed."""
    pdh, chain, amd = bytearray(w.road.pdh), bytearray(w.road.chain), bytearray(w.road.amd)
    if flip > 8:
        target, at = ((pdh, 0x14), (pdh, 0), (chain, 0x14), (chain, 2084 + 0x14), (chain, 2 * 2084 + 0x14), (amd, 100))[flip % 6]
        target[at] ^= 1
    given = s.kvm_sev_send_start(
        pdh_cert_uaddr=w.blob(0, bytes(pdh)), pdh_cert_len=len(pdh), plat_certs_uaddr=w.blob(2, bytes(chain)), plat_certs_len=len(chain),
        amd_certs_uaddr=w.blob(4, bytes(amd)), amd_certs_len=len(amd), session_uaddr=w.output(), session_len=(128, 128, 0, 127, 200)[size],
    )  # fmt: skip
    w.command(w.vm(number), s.KVM_SEV_SEND_START, given, twist(t, v))


def send_update(w: World, number: int, place: int = 0, size: int = 0, t: int = 0, v: int = 0) -> None:
    vm = w.vm(number)
    size = SIZES[size % len(SIZES)]
    given = s.kvm_sev_send_update_data(
        hdr_uaddr=w.output(), hdr_len=52, guest_uaddr=w.arena.guest[w.places[vm]] + PLACES[place % len(PLACES)], guest_len=size,
        trans_uaddr=w.output(second=True), trans_len=size,
    )  # fmt: skip
    w.command(vm, s.KVM_SEV_SEND_UPDATE_DATA, given, twist(t, v))


def send_end(w: World, number: int, cancel: int = 0) -> None:
    w.command(w.vm(number), s.KVM_SEV_SEND_CANCEL if cancel else s.KVM_SEV_SEND_FINISH)


def receive_start(w: World, number: int, which: int = 0, flip: int = 0, policy: int = 0, fd: int = 0, t: int = 0, v: int = 0) -> None:
    """RECEIVE_START with a session that was made here, or one that nobody made."""
    made = list(w.road.sessions.items())
    session, stream = made[-1 - which % len(made)] if made else (bytes(128), Stream(0))
    pdh, spoiled = bytearray(w.road.pdh), bytearray(session)
    if flip > 8:
        target, at = ((pdh, 0x14), (spoiled, 20), (spoiled, 64), (spoiled, 100))[flip % 4]
        target[at] ^= 1
    given = s.kvm_sev_receive_start(
        policy=stream.policy ^ (policy > 8), pdh_uaddr=w.blob(0, bytes(pdh)), pdh_len=len(pdh),
        session_uaddr=w.blob(4, bytes(spoiled)), session_len=len(spoiled),
    )  # fmt: skip
    w.command(w.vm(number), s.KVM_SEV_RECEIVE_START, given, twist(t, v), w.sev_fd(fd))


def receive_update(w: World, number: int, which: int = 0, place: int = 0, flip: int = 0, t: int = 0, v: int = 0) -> None:
    """RECEIVE_UPDATE_DATA with one of the last packets, whoever it was for, perhaps spoiled, perhaps once more."""
    vm = w.vm(number)
    mine = [packet for stream, packet in w.road.packets if vm.guest is not None and stream is vm.guest.stream]
    packets = mine if mine and which < 6 else [packet for _, packet in w.road.packets]
    header, trans = bytearray(52), bytearray(64)
    if packets:
        packet = packets[-1 - which % len(packets)]
        header, trans = bytearray(packet.header), bytearray(packet.trans)
    if flip > 8:
        (header, trans)[flip % 2][-1] ^= 1
    given = s.kvm_sev_receive_update_data(
        hdr_uaddr=w.blob(0, bytes(header)), hdr_len=52, guest_uaddr=w.arena.guest[w.places[vm]] + PLACES[place % len(PLACES)],
        guest_len=len(trans), trans_uaddr=w.blob(4, bytes(trans)), trans_len=len(trans),
    )  # fmt: skip
    w.command(vm, s.KVM_SEV_RECEIVE_UPDATE_DATA, given, twist(t, v))


def receive_finish(w: World, number: int) -> None:
    w.command(w.vm(number), s.KVM_SEV_RECEIVE_FINISH)


def share(w: World, number: int, source: int, move: int, fd: int) -> None:
    """MOVE or COPY; a high `fd` is no VM's."""
    w.share(w.vm(number), w.vm(source) if fd < 12 else None, bool(move), fd)


def flight(w: World, es: int, policy: int, how: int) -> None:
    """A guest on its way: sent by one VM, with two packets, and received by another, as far as `how` says."""
    ready(w, es, policy, 4)
    source = len(w.fds) - 1
    send_start(w, source)
    send_update(w, source, 0, 0)
    send_update(w, source, 1, 1)
    w.create_vm((2, 3)[es])
    there = len(w.fds) - 1
    if there == source or w.vm(there).active:
        return
    w.command(w.vm(there), s.KVM_SEV_INIT2, s.kvm_sev_init())
    for step in (receive_start, receive_update, receive_finish)[:how]:
        step(w, there)


def relative(w: World, number: int, move: int) -> None:
    """A new VM that takes the context of one, or mirrors it, as it should be done."""
    source, before = w.vm(number), len(w.fds)
    w.create_vm(source.type)
    if len(w.fds) == before:
        return
    vm = w.vm(before)
    if move:
        for _ in range(source.vcpus):
            w.create_vcpu(vm)
    w.share(vm, source, bool(move))
