"""The reference's commands of a launch, of debugging and of the rest: each function is one of Linux 7.3's sev.c, check for check."""

from __future__ import annotations

import errno as e
import hmac
import struct
from collections.abc import Callable

from kvmapi.abi import psp
from kvmapi.abi import sev as s
from kvmapi.measurement import expected_measure
from tests.model.sev_reference import (
    ADDRESS,
    API,
    BAD_MAC,
    BLOB_MOST,
    LENGTH,
    POLICY,
    WRONG_STATE,
    Expect,
    Guest,
    Reference,
    Stop,
    Vm,
    pages,
)

Command = Callable[[Reference, Vm, int, int], Expect]
MEASURE, REPORT, HEADER = 48, 208, 52
UPDATE, SECRET, RUNNING, SEND, RECEIVE, SENT = 1, 2, 3, 4, 5, 6


def initialise(ref: Reference, vm: Vm, es: bool, features: int = 0, flags: int = 0, ghcb: int = 0) -> Expect:
    """__sev_guest_init."""
    wrong = vm.vcpus or flags or features & ~(ref.features if es else 0) or ghcb > 2 or (ghcb and not es) or vm.active
    if wrong:
        raise Stop(e.EINVAL)
    if not ref.room[es]:
        raise Stop(e.ENOTTY)
    if ref.taken(es) >= ref.room[es]:
        raise Stop(e.EBUSY)

    def commit() -> None:
        vm.active, vm.es, vm.need_init = True, es, False
        ref.uninit = False

    return Expect(commit=commit)


def init(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    if vm.type != 0:
        raise Stop(e.EINVAL)
    return initialise(ref, vm, False)


def es_init(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    if not ref.room[True]:
        raise Stop(e.ENOTTY)
    if vm.type != 0:
        raise Stop(e.EINVAL)
    return initialise(ref, vm, True)


def init2(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    if not vm.need_init:
        raise Stop(e.EINVAL)
    given = ref.struct(s.kvm_sev_init, data)
    return initialise(ref, vm, vm.type == 3, given.vmsa_features, given.flags, given.ghcb_version)


def policy_refused(ref: Reference, policy: int) -> bool:
    """The policy wants a newer firmware."""
    return (policy >> 16 & 0xFF, policy >> 24 & 0xFF) > API


def begin(ref: Reference, vm: Vm, policy: int, handle: int) -> tuple[bool | int | set[int], ...]:
    """Conditions of LAUNCH_START and RECEIVE_START that concern platform, policy and ASID, with their codes.

    A second START of a VM makes a second guest whose ASID is taken. An ES policy on the wrong kind of VM meets the wrong kind of ASID.
    """
    known = next((guest for guest in ref.guests() if guest.handle == handle), None)
    return (
        ref.uninit, psp.SEV_RET_INVALID_PLATFORM_STATE,
        policy_refused(ref, policy), POLICY,
        bool(policy & s.SEV_POLICY_ES) != vm.es, {psp.SEV_RET_INVALID_ASID, POLICY},
        vm.guest is not None, {psp.SEV_RET_ASID_OWNED, WRONG_STATE},
        bool(handle and known is None), psp.SEV_RET_INVALID_GUEST,
        bool(handle and known is not None and (known.policy != policy or policy & s.SEV_POLICY_NOKS)), POLICY,
    )  # fmt: skip


def launch_start(ref: Reference, vm: Vm, data: int, fd: int, owners: Callable[[bytes, bytes, int], object] | None = None) -> Expect:
    """`owners` judges certificate and session: keys (TEK, TIK), or the codes that are right."""
    ref.sev_guest(vm)
    given = ref.struct(s.kvm_sev_launch_start, data)
    dh = ref.blob(given.dh_uaddr, given.dh_len) if given.dh_uaddr else b""
    session = ref.blob(given.session_uaddr, given.session_len) if given.session_uaddr else b""
    ref.issue(fd)
    keys = owners(dh, session, given.policy) if owners is not None and session else None
    bad = keys if isinstance(keys, set) else set()
    ref.firmware(*begin(ref, vm, given.policy, given.handle), bool(bad), bad)
    if not ref.memory.writable(data, 40):
        return Expect(e.EFAULT, {0}, [(data, 40)])  # the kernel unbinds the guest again

    def commit() -> None:
        handle = struct.unpack("<I", ref.memory.read(data, 4))[0]
        known = {guest.handle for guest in ref.guests()}
        assert handle and handle not in known, f"handle {handle} is not new among {sorted(known)}"
        vm.fd, vm.guest = fd, Guest(handle, given.policy, UPDATE, keys if isinstance(keys, tuple) else None)

    maybe = {LENGTH, psp.SEV_RET_INVALID_CERTIFICATE, psp.SEV_RET_INVALID_PARAM} if dh and not session else set()
    return Expect(codes={0}, may_change=[(data, 4)], commit=commit, maybe=maybe)


def launch_update_data(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    ref.sev_guest(vm)
    given = ref.struct(s.kvm_sev_launch_update_data, data)
    address, size = given.uaddr, given.len
    ref.pin(vm, address, size, write=True)
    guest = ref.stored(vm)
    ref.firmware(guest.state != UPDATE, WRONG_STATE, bool(address % 16), {ADDRESS, LENGTH}, bool(size % 16), {ADDRESS, LENGTH})
    plain = ref.memory.read(address, size)

    def commit() -> None:
        now = ref.memory.read(address, size)
        assert all(now[at : at + 16] != plain[at : at + 16] for at in range(0, size, 16)), "memory still holds the plaintext"
        guest.learn(address, now, plain)
        guest.launched.append(plain)

    return Expect(codes={0}, may_change=[(address, size)], commit=commit)


def launch_update_vmsa(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    ref.sev_guest(vm)
    if not vm.es:
        raise Stop(e.ENOTTY)
    if not vm.vcpus:
        return Expect()
    if vm.protected:
        raise Stop(e.EINVAL)
    guest = ref.stored(vm)
    ref.firmware(guest.state != UPDATE, WRONG_STATE)

    def commit() -> None:
        guest.vmsas += vm.vcpus
        vm.protected = vm.vcpus

    return Expect(codes={0}, commit=commit)


def launch_measure(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    ref.sev_guest(vm)
    given = ref.struct(s.kvm_sev_launch_measure, data)

    def acted(guest: Guest) -> None:
        guest.state = SECRET  # with a measurement that nobody knows

    def commit(guest: Guest) -> None:
        _measured(ref, guest, given.uaddr)

    return _filled(ref, vm, data, 8, (given.uaddr, given.len), MEASURE, (UPDATE,), commit, acted)


def _filled(
    ref: Reference,
    vm: Vm,
    data: int,
    at: int,
    buffer: tuple[int, int],
    need: int,
    states: tuple[int, ...],
    commit: Callable[[Guest], None],
    acted: Callable[[Guest], None] = lambda guest: None,
) -> Expect:
    """The end of LAUNCH_MEASURE and of GET_ATTESTATION_REPORT: length queries, buffers that are too short, copies that fail.

    The struct's length is at `data` + `at`; the answer has `need` bytes.
    """
    address, size = buffer
    if not size:
        return ref.query(vm, states, data, at + 4, [(data + at, 4)])
    if address and size > BLOB_MOST:
        raise Stop(e.EINVAL)
    guest = ref.stored(vm)
    ref.firmware(guest.state not in states, WRONG_STATE, size < need, LENGTH, not address, {LENGTH, ADDRESS})
    changes = [(address, size), (data + at, 4)]
    if not ref.memory.writable(address, size) or not ref.memory.writable(data, at + 4):
        return Expect(e.EFAULT, {0}, changes, acted=lambda: acted(guest))

    def both() -> None:
        commit(guest)
        assert ref.memory.read(data + at, 4) == struct.pack("<I", need), "the length that was written is not told"

    overlap = address < data + at + 4 and data < address + size
    return Expect(codes={0}, may_change=changes, commit=(lambda: acted(guest)) if overlap else both)


def _measured(ref: Reference, guest: Guest, address: int) -> None:
    """The guest goes on; with the owner's keys, the MAC is the one that the owner expects."""
    guest.state = SECRET
    measure, nonce = ref.memory.read(address, 32), ref.memory.read(address + 32, 16)
    guest.measure = measure
    if guest.keys is not None and not guest.vmsas:
        import hashlib

        digest = hashlib.sha256(b"".join(guest.launched)).digest()
        right = expected_measure(guest.keys[1], digest, nonce, policy=guest.policy, api_major=API[0], api_minor=API[1], build=15)
        assert measure == right, "the measurement is not the owner's"


def launch_finish(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    return _step(ref, vm, SECRET, RUNNING)


def _step(ref: Reference, vm: Vm, before: int, after: int) -> Expect:
    """A command without a struct, from one state to another."""
    ref.sev_guest(vm)
    guest = ref.stored(vm)
    ref.firmware(guest.state != before, WRONG_STATE)
    return Expect(codes={0}, commit=lambda: setattr(guest, "state", after))


def guest_status(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    ref.sev_guest(vm)
    guest = ref.stored(vm)
    if not ref.memory.writable(data, 12):
        return Expect(e.EFAULT, {0}, [(data, 12)])

    def commit() -> None:
        told = struct.unpack("<III", ref.memory.read(data, 12))
        assert told == (guest.handle, guest.policy, guest.state), f"{told}, not {(guest.handle, guest.policy, guest.state)}"

    return Expect(codes={0}, may_change=[(data, 12)], commit=commit)


def launch_secret(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    ref.sev_guest(vm)
    given = ref.struct(s.kvm_sev_launch_secret, data)
    address, size = given.guest_uaddr, given.guest_len
    ref.pin(vm, address, size, write=True)
    if address % 4096 + size > 4096:
        raise Stop(e.EINVAL)  # two pages of the model are never physically contiguous
    trans = ref.blob(given.trans_uaddr, given.trans_len)
    header = ref.blob(given.hdr_uaddr, given.hdr_len)
    guest = ref.stored(vm)
    ref.firmware(guest.state != SECRET, WRONG_STATE, *packet_wrong(address, size, header, trans, guest))
    plain = _ctr(guest.keys[0] if guest.keys else b"", header[4:20], trans)

    def commit() -> None:
        now = ref.memory.read(address, size)
        assert now != plain, "the secret stands in memory in the clear"
        guest.learn(address, now, plain)

    return Expect(codes={0}, may_change=[(address, size)], commit=commit)


def packet_wrong(address: int, size: int, header: bytes, trans: bytes, guest: Guest) -> tuple[bool | int | set[int], ...]:
    """What LAUNCH_SECRET checks in a packet: lengths, alignment, MAC. Flags come after the MAC and are 0 in packets that are made here."""
    lengths = len(header) != HEADER or len(trans) != size
    message = b"\x01" + header[:20] + struct.pack("<II", size, len(trans)) + trans + guest.measure
    known = guest.keys is not None and guest.measure and not lengths
    good = known and guest.keys and hmac.digest(guest.keys[1], message, "sha256") == header[20:]
    return (
        lengths, LENGTH, bool(address % 16), {ADDRESS, LENGTH}, bool(size % 16), {ADDRESS, LENGTH},
        not good and len(header) >= HEADER, BAD_MAC,
    )  # fmt: skip


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(data)


def attestation(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    ref.sev_guest(vm)
    given = ref.struct(s.kvm_sev_attestation_report, data)
    nonce = bytes(given.mnonce)

    def commit(guest: Guest) -> None:
        report = ref.memory.read(given.uaddr, REPORT)
        assert (report[:16], report[48:52]) == (nonce, struct.pack("<I", guest.policy)), "the report is about another nonce or policy"

    return _filled(ref, vm, data, 24, (given.uaddr, given.len), REPORT, (SECRET, RUNNING, SEND), commit)


def debug(ref: Reference, vm: Vm, data: int, fd: int, decrypt: bool) -> Expect:
    """sev_dbg_crypt: page by page, so what came before a page that cannot be pinned is done."""
    ref.sev_guest(vm)
    given = ref.struct(s.kvm_sev_dbg, data)
    src, dst, size = given.src_uaddr, given.dst_uaddr, given.len
    if not size or not src or not dst or src + size >= 1 << 64 or dst + size >= 1 << 64:
        raise Stop(e.EINVAL)
    expect = Expect(may_change=[(dst & -16, size + 32)] if not decrypt else [(dst, size)])
    for at, _length in pages(src, size, dst):
        try:
            ref.page(vm, src + at, write=False)
            ref.page(vm, dst + at, write=True, others=1)
            guest = ref.stored(vm)
        except Stop as stop:
            expect.errno = stop.errno
            break
        wrong = [(guest.policy & 1, POLICY), (guest.state == SENT, WRONG_STATE)]
        expect.codes = {code for holds, code in wrong if holds}
        if expect.codes:
            expect.errno = e.EIO
            break
        expect.codes = {0}
    if expect.errno:
        expect.may_change = [(dst & -16, at + 32)] if at else []  # whole blocks, at both ends
    else:
        guest, before = ref.stored(vm), ref.memory.read(src, size)
        apart = src + size <= dst or dst + size <= src
        if decrypt and apart and not (src | size) % 16 and (plain := guest.plain(src, before)) is not None:
            expect.commit = lambda: _same(ref.memory.read(dst, size), plain)
        elif not decrypt and apart and not (src | dst | size) % 16:
            expect.commit = lambda: guest.learn(dst, ref.memory.read(dst, size), before)
    return expect


def _same(given: bytes, right: bytes | None) -> None:
    assert given == right, "DBG_DECRYPT does not show what was encrypted there"


def dbg_decrypt(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    return debug(ref, vm, data, fd, True)


def dbg_encrypt(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
    return debug(ref, vm, data, fd, False)
