"""The reference's commands of sending and receiving, and the table of all commands."""

from __future__ import annotations

import errno as e
import struct
from collections.abc import Callable
from dataclasses import dataclass

from kvmapi.abi import sev as s
from tests.model import sev_reference_launch as launch
from tests.model.sev_reference import (
    ADDRESS,
    BAD_MAC,
    BAD_SIGNATURE,
    BLOB_MOST,
    CERTIFICATE,
    KMALLOC_MOST,
    LENGTH,
    POLICY,
    SENTINEL,
    WRONG_STATE,
    Expect,
    Guest,
    Reference,
    Stop,
    Vm,
)
from tests.model.sev_reference_launch import HEADER, RECEIVE, RUNNING, SEND, SENT, Command

SESSION = 128
NODBG, NOSEND, DOMAIN, SEV = 1, 8, 16, 32


@dataclass(eq=False)
class Stream:
    """One SEND_START: the transport keys that its packets are made with."""

    policy: int


@dataclass(frozen=True)
class Packet:
    """One page part on its way, and what it means where that is known."""

    header: bytes
    trans: bytes
    plain: bytes | None


class Road:
    """What goes from platform to platform: certificates that are right, sessions that were made, packets, and whose they are."""

    def __init__(self, pdh: bytes, chain: bytes, amd: bytes) -> None:
        self.pdh, self.chain, self.amd = pdh, chain, amd
        self.sessions: dict[bytes, Stream] = {}
        self.packets: list[tuple[Stream, Packet]] = []

    # ---- sending
    def send_start(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        ref.sev_guest(vm)
        given = ref.struct(s.kvm_sev_send_start, data)
        back, reach = [(data, 72)], ref.memory.writable(data, 72)
        if not given.session_len:
            return ref.query(vm, (RUNNING,), data, 72, back)
        if not given.pdh_cert_uaddr or not given.pdh_cert_len or not given.session_uaddr or given.session_len > BLOB_MOST:
            raise Stop(e.EINVAL)
        pdh = ref.blob(given.pdh_cert_uaddr, given.pdh_cert_len)
        chain = ref.blob(given.plat_certs_uaddr, given.plat_certs_len)
        amd = ref.blob(given.amd_certs_uaddr, given.amd_certs_len)
        try:
            guest = ref.stored(vm)
        except Stop as stop:  # written back all the same
            return Expect(stop.errno if reach else e.EFAULT, stop.codes or {SENTINEL}, back)
        trust = {CERTIFICATE, BAD_SIGNATURE, LENGTH}
        codes = self._wrong(
            (guest.state != RUNNING, {WRONG_STATE}),
            (bool(guest.policy & NOSEND), {POLICY}),
            (given.session_len < SESSION, {LENGTH}),
            (pdh != self.pdh, trust),
            (chain != self.chain, trust),
            (amd != self.amd and bool(guest.policy & SEV), trust | {POLICY}),
        )
        if codes:
            return Expect(e.EIO if reach else e.EFAULT, codes, back)
        maybe = trust | {POLICY} if amd != self.amd else set()  # nobody needs the AMD chain then

        def acted() -> None:
            guest.state, guest.stream = SEND, Stream(guest.policy)

        changes = [*back, (given.session_uaddr, given.session_len)]
        if not reach or not ref.memory.writable(given.session_uaddr, given.session_len):
            return Expect(e.EFAULT, {0} | maybe, changes, acted=acted)

        def commit() -> None:
            stream = Stream(guest.policy)
            guest.state, guest.stream = SEND, stream
            if given.session_uaddr + SESSION <= data or data + 72 <= given.session_uaddr:
                self.sessions[ref.memory.read(given.session_uaddr, SESSION)] = stream

        return Expect(codes={0}, may_change=changes, commit=commit, maybe=maybe)

    @staticmethod
    def _wrong(*conditions: tuple[bool, set[int]]) -> set[int]:
        return {code for holds, codes in conditions if holds for code in codes}

    def send_update_data(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        ref.sev_guest(vm)
        given = ref.struct(s.kvm_sev_send_update_data, data)
        address, size = given.guest_uaddr, given.guest_len
        if not given.trans_len or not given.hdr_len:
            return ref.query(vm, (SEND,), data, 48, [(data + 8, 4), (data + 40, 4)])
        if not given.trans_uaddr or not address or not size or not given.hdr_uaddr:
            raise Stop(e.EINVAL)
        ref.one_page(address, size)
        ref.page(vm, address, write=False)
        if max(given.hdr_len, given.trans_len) > KMALLOC_MOST:
            raise Stop(e.ENOMEM)
        guest = ref.stored(vm)
        ref.firmware(
            guest.state != SEND, WRONG_STATE, given.hdr_len < HEADER, LENGTH, given.trans_len < size, LENGTH,
            bool(address % 16), {ADDRESS, LENGTH}, bool(size % 16), {ADDRESS, LENGTH},
        )  # fmt: skip
        trans, header = (given.trans_uaddr, given.trans_len), (given.hdr_uaddr, given.hdr_len)
        if not ref.memory.writable(*trans):
            return Expect(e.EFAULT, {0}, [trans])
        if not ref.memory.writable(*header):
            return Expect(e.EFAULT, {0}, [trans, header])
        plain = guest.plain(address, ref.memory.read(address, size))

        def commit() -> None:
            apart = trans[0] + trans[1] <= header[0] or header[0] + header[1] <= trans[0]
            if apart and isinstance(guest.stream, Stream):
                packet = Packet(ref.memory.read(header[0], HEADER), ref.memory.read(trans[0], size), plain)
                assert packet.trans != plain, "the packet is in the clear"
                self.packets = [*self.packets[-7:], (guest.stream, packet)]

        return Expect(codes={0}, may_change=[trans, header], commit=commit)

    def send_finish(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        return launch._step(ref, vm, SEND, SENT)

    def send_cancel(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        return launch._step(ref, vm, SEND, RUNNING)

    # ---- receiving
    def receive_start(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        ref.sev_guest(vm)
        given = ref.struct(s.kvm_sev_receive_start, data)
        if not given.pdh_uaddr or not given.pdh_len or not given.session_uaddr or not given.session_len:
            raise Stop(e.EINVAL)
        pdh = ref.blob(given.pdh_uaddr, given.pdh_len)
        session = ref.blob(given.session_uaddr, given.session_len)
        ref.issue(fd)
        stream = self.sessions.get(session)
        ref.firmware(
            *launch.begin(ref, vm, given.policy, 0), len(session) != SESSION, LENGTH,
            pdh != self.pdh, {CERTIFICATE, BAD_MAC, BAD_SIGNATURE, LENGTH},
            stream is None or stream.policy != given.policy, BAD_MAC,
        )  # fmt: skip
        if not ref.memory.writable(data, 40):
            return Expect(e.EFAULT, {0}, [(data, 40)])

        def commit() -> None:
            handle = struct.unpack("<I", ref.memory.read(data, 4))[0]
            assert handle and handle not in {guest.handle for guest in ref.guests()}
            vm.fd, vm.guest = fd, Guest(handle, given.policy, RECEIVE, stream=stream)

        return Expect(codes={0}, may_change=[(data, 4)], commit=commit)

    def receive_update_data(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        ref.sev_guest(vm, e.EINVAL)
        given = ref.struct(s.kvm_sev_receive_update_data, data)
        address, size = given.guest_uaddr, given.guest_len
        if not all((given.hdr_uaddr, given.hdr_len, address, size, given.trans_uaddr, given.trans_len)):
            raise Stop(e.EINVAL)
        ref.one_page(address, size)
        header = ref.blob(given.hdr_uaddr, given.hdr_len)
        trans = ref.blob(given.trans_uaddr, given.trans_len)
        ref.page(vm, address, write=True)
        guest = ref.stored(vm)
        found = next((p for stream, p in self.packets if stream is guest.stream and (p.header, p.trans) == (header, trans)), None)
        ref.firmware(
            guest.state != RECEIVE, WRONG_STATE, len(header) != HEADER or len(trans) != size, LENGTH,
            bool(address % 16), {ADDRESS, LENGTH}, bool(size % 16), {ADDRESS, LENGTH},
            found is None or len(trans) != size, BAD_MAC,
        )  # fmt: skip

        def commit() -> None:
            if found is not None and found.plain is not None:
                now = ref.memory.read(address, size)
                assert now != found.plain, "received memory is in the clear"
                guest.learn(address, now, found.plain)

        return Expect(codes={0}, may_change=[(address, size)], commit=commit)

    def receive_finish(self, ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        return launch._step(ref, vm, RECEIVE, RUNNING)

    def commands(self, owners: Callable[[bytes, bytes, int], object]) -> dict[int, Command]:
        """Every command that KVM dispatches, by id; the others are EINVAL."""
        return {
            s.KVM_SEV_INIT: launch.init,
            s.KVM_SEV_ES_INIT: launch.es_init,
            s.KVM_SEV_INIT2: launch.init2,
            s.KVM_SEV_LAUNCH_START: lambda ref, vm, data, fd: launch.launch_start(ref, vm, data, fd, owners),
            s.KVM_SEV_LAUNCH_UPDATE_DATA: launch.launch_update_data,
            s.KVM_SEV_LAUNCH_UPDATE_VMSA: launch.launch_update_vmsa,
            s.KVM_SEV_LAUNCH_SECRET: launch.launch_secret,
            s.KVM_SEV_LAUNCH_MEASURE: launch.launch_measure,
            s.KVM_SEV_LAUNCH_FINISH: launch.launch_finish,
            s.KVM_SEV_SEND_START: self.send_start,
            s.KVM_SEV_SEND_UPDATE_DATA: self.send_update_data,
            s.KVM_SEV_SEND_FINISH: self.send_finish,
            s.KVM_SEV_SEND_CANCEL: self.send_cancel,
            s.KVM_SEV_RECEIVE_START: self.receive_start,
            s.KVM_SEV_RECEIVE_UPDATE_DATA: self.receive_update_data,
            s.KVM_SEV_RECEIVE_FINISH: self.receive_finish,
            s.KVM_SEV_GUEST_STATUS: launch.guest_status,
            s.KVM_SEV_DBG_DECRYPT: launch.dbg_decrypt,
            s.KVM_SEV_DBG_ENCRYPT: launch.dbg_encrypt,
            s.KVM_SEV_GET_ATTESTATION_REPORT: launch.attestation,
            s.KVM_SEV_SNP_LAUNCH_START: refuse(e.ENOTTY),
            s.KVM_SEV_SNP_LAUNCH_UPDATE: refuse(e.EINVAL),
            s.KVM_SEV_SNP_LAUNCH_FINISH: refuse(e.ENOTTY),
            s.KVM_SEV_SNP_ENABLE_REQ_CERTS: refuse(e.EINVAL),
        }


def refuse(number: int) -> Command:
    """An SNP command on a VM that is none."""

    def command(ref: Reference, vm: Vm, data: int, fd: int) -> Expect:
        raise Stop(number)

    return command
