"""What no mainline selftest checks of SEV: the measurement's value, secrets, conversions by MAP_GPA_RANGE, registers out of reach.

The measurement is computed here from first principles (SHA-256 of what was put in, HMAC with the owner's key), not with the library.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL

from guest.patterns import pattern_converted, pattern_private, pattern_shared
from kvmapi.abi import kvm
from kvmapi.abi import sev as s
from kvmapi.abi.psp import SEV_RET_BAD_MEASUREMENT, SEV_RET_INVALID_GUEST_STATE, SEV_RET_INVALID_LEN
from kvmapi.abi.vcpu import kvm_regs, kvm_sregs, kvm_xsave
from kvmapi.exit_types import Exit, Hypercall
from kvmapi.launch import Measured, guest_status
from kvmapi.session import OwnerSession
from kvmapi.session_crypto import seal_secret
from kvmapi.sev import SevPlatform
from kvmapi.system import System
from kvmapi.vcpu import Vcpu
from kvmapi.vmsa import build_vmsa, reset_registers
from vmm import boot
from vmm.measure import Setup, predict
from vmm.selftests.api import Case, MachineFactory, Subtest, check_equal, expect_errno, expect_firmware, runs_on
from vmm.selftests.sev_vms import SevGuest

PAGE = 4096
DATA = b"".join(hashlib.sha256(number.to_bytes(4, "little")).digest() for number in range(4 * PAGE // 32))
on_sev = runs_on("sev", "sev-es")


# ---- the measurement
@contextmanager
def launched(system: System, case: Case, data: bytes = DATA, policy: int = 0, pieces: tuple[int, ...] = ()) -> Iterator[Launched]:
    """A guest with an owner, measured: `data` in one piece, or its pages in the order `pieces`."""
    with SevPlatform(system.host) as platform:
        guest = SevGuest(system, platform, type=case.vm_type)
        try:
            guest.init().add_vcpus(2 if case.type == "sev-es" else 1).add_memory(data)
            guest.updates = [(page * PAGE, PAGE) for page in pieces] or guest.updates
            owner = OwnerSession.create(platform.pdh_cert_export()[0], policy | es_bit(case))
            yield Launched(guest.start(owner.policy, owner), owner)
        finally:
            guest.close()


def es_bit(case: Case) -> int:
    """The policy bit that an SEV-ES guest needs."""
    return s.SEV_POLICY_ES if case.type == "sev-es" else 0


class Launched:
    """A guest in LAUNCH_UPDATE and its owner."""

    def __init__(self, guest: SevGuest, owner: OwnerSession) -> None:
        self.guest = guest
        self.owner = owner

    def expected(self, measured: bytes, tik: bytes | None = None, policy: int | None = None) -> bytes:
        """The MAC by the firmware's formula, for what should have been `measured`."""
        assert self.guest.platform is not None
        status = self.guest.platform.status()
        policy = self.owner.policy if policy is None else policy
        head = bytes((4, status.api_major, status.api_minor, status.build)) + policy.to_bytes(4, "little")
        digest = hashlib.sha256(measured).digest()
        return hmac.digest(self.owner.tik if tik is None else tik, head + digest + self.guest.nonce, "sha256")


def vmsas(case: Case) -> bytes:
    """What the VMSAs of two vCPUs nobody has set up add to the measurement."""
    if case.type != "sev-es":
        return b""
    return 2 * build_vmsa(*reset_registers())


@on_sev
def test_measurement(system: System, case: Case, subtest: Subtest) -> None:
    """The firmware's answer is the MAC of exactly what was put in, in that order, under that policy and owner."""
    tail = vmsas(case)
    with subtest("all in one command"), launched(system, case) as one:
        one.guest.measure()
        check_equal(one.guest.mac, one.expected(DATA + tail), "the measurement")
        assert one.guest.mac != one.expected(DATA[:-1] + bytes([DATA[-1] ^ 1]) + tail), "another byte, the same measurement"
        assert one.guest.mac != one.expected(DATA + tail, tik=bytes(16)), "another owner, the same measurement"
        assert one.guest.mac != one.expected(DATA + tail, policy=one.owner.policy | s.SEV_POLICY_NOKS), "another policy"
        first = one.guest.nonce
    with subtest("page by page"), launched(system, case, pieces=(0, 1, 2, 3)) as pages:
        pages.guest.measure()
        check_equal(pages.guest.mac, pages.expected(DATA + tail), "the measurement")
        assert pages.guest.nonce != first, "two launches got one nonce"
    with subtest("in another order"), launched(system, case, pieces=(2, 0, 3, 1)) as mixed:
        mixed.guest.measure()
        order = b"".join(DATA[page * PAGE : (page + 1) * PAGE] for page in (2, 0, 3, 1))
        check_equal(mixed.guest.mac, mixed.expected(order + tail), "the measurement")
    with subtest("with another policy"), launched(system, case, policy=s.SEV_POLICY_NODBG | s.SEV_POLICY_NOSEND) as strict:
        strict.guest.measure()
        check_equal(strict.guest.mac, strict.expected(DATA + tail), "the measurement")


@on_sev
def test_measurement_length(system: System, case: Case) -> None:
    """With no room LAUNCH_MEASURE tells the length, with too little it fails; the guest can still be measured, once."""
    with launched(system, case) as it:
        for length in (0, s.MEASURE_SIZE - 1):
            room = s.kvm_sev_launch_measure(uaddr=it.guest.hva if length else 0, len=length)
            with expect_firmware(SEV_RET_INVALID_LEN):
                it.guest.command(s.KVM_SEV_LAUNCH_MEASURE, room)
            check_equal(room.len, length or s.MEASURE_SIZE, "the length that LAUNCH_MEASURE left")  # KVM writes back a query only
            check_equal(guest_status(it.guest.vm).state, s.SEV_STATE_LAUNCH_UPDATE, "the state after it")
        it.guest.measure()
        with expect_firmware(SEV_RET_INVALID_GUEST_STATE):
            it.guest.measure()


@on_sev
def test_measurement_predicted(machine: MachineFactory, case: Case) -> None:
    """`sevmm measure` says beforehand what a bundled guest's launch measures."""
    m = machine("hello", vcpus=2, arguments="measured")
    assert m.launch is not None and m.launch.match
    setup = Setup(
        "hello", case.type, m.launch.policy, m.config.memory, 2, b"measured", c_bit=m.c_mask.bit_length() - 1, features=m.features
    )  # fmt: skip
    check_equal(m.launch.digest, predict(setup, m.config.image).digest, "the digest of the launch")


# ---- secrets
SECRET = bytes(range(1, 65))

SECRET_CODE = r"""
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	const uint64_t *page = (uint64_t *)0x6000;

	(void)boot;
	(void)vcpu;
	GUEST_ASSERT(memcmp(page, "SEVMMSEC", 8) == 0);
	GUEST_ASSERT_EQ(page[1], 64);
	ucall_sync(1, page[2], page[3], page[8], page[9]);
	return 0;
}
"""


@on_sev
def test_secret_in_guest(machine: MachineFactory) -> None:
    """A secret that its owner sealed is in the guest's private memory when it starts, and the host does not see it there."""
    m = machine(SECRET_CODE, secret=SECRET)
    assert SECRET[:16] not in m.memory.read(boot.SECRET_PAGE, PAGE), "the host sees the secret"
    words = m.sync(stage=1).args[:4]
    found = b"".join(word.to_bytes(8, "little") for word in words)
    check_equal(found, SECRET[:16] + SECRET[48:], "the secret's first and last 16 bytes, as the guest reads them")
    m.done()


@on_sev
def test_secret_packet(system: System, case: Case, subtest: Subtest) -> None:
    """The firmware opens a packet for this guest, after its measurement, that nobody touched; and no other."""
    with launched(system, case) as it:
        guest, owner = it.guest, it.owner

        def send(header: bytes, packet: bytes) -> None:
            Measured(guest.vm, owner.policy, 0, b"", b"").secret(header, packet, guest.hva + PAGE)

        with subtest("before the measurement"), expect_firmware(SEV_RET_INVALID_GUEST_STATE):
            send(bytes(52), bytes(64))
        guest.measure()
        header, packet = seal_secret(owner.tek, owner.tik, SECRET, bytes(16), measure=guest.mac)
        other_header, other_packet = seal_secret(owner.tek, owner.tik, SECRET, bytes(16), measure=bytes(32))
        before = guest_memory(guest)
        for name, wrong_header, wrong_packet in (
            ("a bit of the packet flipped", header, bytes([packet[0] ^ 1]) + packet[1:]),
            ("a bit of the header's MAC flipped", header[:-1] + bytes([header[-1] ^ 1]), packet),
            ("a bit of the header's IV flipped", header[:4] + bytes([header[4] ^ 1]) + header[5:], packet),
            ("a shorter packet", header, packet[:48]),
            ("for another measurement", other_header, other_packet),
        ):
            with subtest(name):
                with expect_firmware(SEV_RET_BAD_MEASUREMENT):
                    send(wrong_header, wrong_packet)
                check_equal(guest_memory(guest), before, "the guest's memory after a refused packet")
        with subtest("the right one"):
            send(header, packet)
            assert SECRET[:16] not in guest_memory(guest), "the host sees the secret"
            launch = Measured(guest.vm, owner.policy, 0, b"", b"")
            found = launch.dbg_decrypt(guest.hva, 4 * PAGE)
            check_equal(found, DATA[:PAGE] + SECRET + DATA[PAGE + len(SECRET) :], "the guest's memory, decrypted")
        guest.finish()
        with subtest("after the launch"), expect_firmware(SEV_RET_INVALID_GUEST_STATE):
            send(header, packet)


def guest_memory(guest: SevGuest) -> bytes:
    """The guest's memory as the host sees it: ciphertext."""
    assert guest.memory is not None
    return guest.memory[:]


# ---- conversions
CONVERT_CODE = r"""
#include "hypercall.h"
#include "paging.h"
#include "patterns.h"
#include "ucall.h"

#define LOOK	8

static void bad_calls(uint64_t area)
{
	GUEST_ASSERT_EQ((uint64_t)map_gpa_range(area + 8, 1, KVM_MAP_GPA_RANGE_ENCRYPTED), (uint64_t)-KVM_EINVAL);
	GUEST_ASSERT_EQ((uint64_t)map_gpa_range(area, 0, KVM_MAP_GPA_RANGE_ENCRYPTED), (uint64_t)-KVM_EINVAL);
	GUEST_ASSERT_EQ((uint64_t)map_gpa_range(area, ~0UL, KVM_MAP_GPA_RANGE_ENCRYPTED), (uint64_t)-KVM_EINVAL);
}

/* Converts `pages` pages; of many, only the last LOOK are written and read. */
static void there_and_back(uint64_t start, uint64_t pages)
{
	uint64_t size = (pages < LOOK ? pages : LOOK) * PAGE_SIZE, at = start + pages * PAGE_SIZE - size;

	fill(at, size, PATTERN_SHARED, 0);
	ucall_sync(1, at, size);
	make_private(start, pages);
	verify_hidden("private", at, size, PATTERN_SHARED, 0);
	fill(at, size, PATTERN_PRIVATE, 0);
	ucall_sync(2, at, size);
	verify("private, seen by the host", at, size, PATTERN_PRIVATE, 0);
	make_shared(start, pages);
	verify_hidden("shared", at, size, PATTERN_PRIVATE, 0);
	fill(at, size, PATTERN_CONVERTED, 0);
	ucall_sync(3, at, size);
	verify("shared, written by the host", at, size, PATTERN_SHARED, 0);
}

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	paging_start(boot);
	bad_calls(boot->test_area);
	there_and_back(boot->test_area, 1);
	there_and_back(boot->test_area + 3 * PAGE_SIZE, 5);
	there_and_back(boot->test_area + PAGE_2M, PAGE_2M / PAGE_SIZE);
	return 0;
}
"""


@runs_on("sev", "sev-es", needs={"hypercall"})
def test_map_gpa_range(machine: MachineFactory) -> None:
    """Each conversion reaches user space with its range and direction; shared memory is the host's too, private memory is ciphertext."""
    m, calls = machine(CONVERT_CODE), []

    def record(vcpu: Vcpu, exit: Exit) -> bool:
        if isinstance(exit, Hypercall):
            assert exit.nr == kvm.KVM_HC_MAP_GPA_RANGE and exit.long_mode, exit
            calls.append(exit.args[:3])
        return False  # the machine answers

    m.handlers.append(record)
    expected = []
    for offset, pages in ((0, 1), (3 * PAGE, 5), (2 << 20, 512)):
        start = boot.TEST_AREA + offset
        gpa, size = m.sync(stage=1).args[:2]
        m.expect_memory(gpa, pattern_shared(0, size))
        m.sync(stage=2)
        m.expect_map(start, pages * PAGE, "private")
        assert pattern_private(0, 16) not in m.memory.read(gpa, size), "the host sees private memory"
        m.sync(stage=3)
        m.expect_map(start, pages * PAGE, "shared")
        m.expect_memory(gpa, pattern_converted(0, size))
        m.memory.write(gpa, pattern_shared(0, size))
        expected += [(start, pages, kvm.KVM_MAP_GPA_RANGE_ENCRYPTED), (start, pages, kvm.KVM_MAP_GPA_RANGE_DECRYPTED)]
    m.done()
    check_equal(calls, expected, "the hypercalls that reached user space")
    m.expect_exits(HYPERCALL=len(expected))


ANSWERS_CODE = r"""
#include "hypercall.h"
#include "ucall.h"

unsigned guest_main(const struct boot_info *boot, unsigned vcpu)
{
	(void)vcpu;
	for (unsigned i = 0; i < 4; i++)
		ucall_sync(1, (uint64_t)map_gpa_range(boot->test_area, 1, KVM_MAP_GPA_RANGE_ENCRYPTED));
	return 0;
}
"""


@runs_on("sev", "sev-es", needs={"hypercall"})
def test_map_gpa_range_answers(machine: MachineFactory) -> None:
    """The guest gets exactly what user space answers; nothing changes unless user space does it."""
    m = machine(ANSWERS_CODE)
    answers = [0, -kvm.KVM_ENOSYS, 0x123456789ABCDEF0, -1]

    def answer(vcpu: Vcpu, exit: Exit) -> bool:
        if isinstance(exit, Hypercall):
            vcpu.answer_hypercall(answers[m.counts["HYPERCALL"] - 1])
            return True
        return False

    m.handlers.append(answer)
    for value in answers:
        check_equal(m.sync(stage=1).args[0], value & (1 << 64) - 1, "what the guest got")
        m.expect_map(boot.TEST_AREA, PAGE, "shared")
    m.done()


@on_sev
def test_map_gpa_range_off(machine: MachineFactory) -> None:
    """Where user space did not ask for the exit, KVM answers that it knows no such call."""
    m = machine(ANSWERS_CODE, hypercalls=False)
    for _ in range(4):
        check_equal(m.sync(stage=1).args[0], -kvm.KVM_ENOSYS & (1 << 64) - 1, "what the guest got")
    m.done()
    m.expect_exits(HYPERCALL=0)


# ---- registers
@runs_on("sev-es")
def test_registers_hidden(machine: MachineFactory, subtest: Subtest) -> None:
    """After the launch the host can neither read nor write an SEV-ES guest's registers, running or not."""
    m = machine(SECRET_CODE, secret=SECRET)
    vcpu = m.vcpus[0]
    for when in ("before its first instruction", "in the middle"):
        for name, call in (
            ("KVM_GET_REGS", vcpu.get_regs), ("KVM_SET_REGS", lambda: vcpu.set_regs(kvm_regs())),
            ("KVM_GET_SREGS", vcpu.get_sregs), ("KVM_SET_SREGS", lambda: vcpu.set_sregs(kvm_sregs())),
            ("KVM_GET_XSAVE", vcpu.get_xsave), ("KVM_SET_XSAVE", lambda: vcpu.set_xsave(kvm_xsave())),
            ("KVM_GET_DEBUGREGS", vcpu.get_debugregs),
        ):  # fmt: skip
            with subtest(f"{name} {when}"), expect_errno(EINVAL):
                call()
        if when == "before its first instruction":
            m.sync(stage=1)
    m.done()
