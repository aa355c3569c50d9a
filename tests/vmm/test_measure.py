"""Predictions of launches: equal to what is really measured, right by an independent oracle, and precise about what differs."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from guest.catalogue import GUESTS
from tests.vmm import flat
from vmm import boot
from vmm.config import MachineConfig
from vmm.image import Image, Segment
from vmm.launch import CHUNK, SevLaunch, default_policy
from vmm.machine import Machine
from vmm.measure import (
    INIT,
    MeasuredRegion,
    MeasuredVmsa,
    Measurement,
    Setup,
    compare,
    predict,
    predicted_vmsas,
    regions,
    runs,
    setup_differences,
)
from vmm.run import GuestRequest, find_guest, load_guest, run_guest

MIB = 1 << 20
SEV = Setup("flat", "sev", 3, 16 * MIB)
ES = Setup("flat", "sev-es", 7, 16 * MIB, vcpus=3)
SEV_GUESTS = [(guest.name, type) for guest in GUESTS for type in ("sev", "sev-es") if type in guest.types and not guest.sample]


# -- what is written and measured ---------------------------------------------------------------------------------------------------------


def plain_pages(info: boot.BootInfo, image: Image) -> dict[int, bytes]:
    """The pages of a guest, the slow way: every segment's bytes laid into zeroes."""
    found = dict(boot.pages(info, image.symbols))
    for segment in image.segments:
        first, last = segment.gpa & ~0xFFF, -(-segment.end // 4096) * 4096
        room = bytearray(last - first)
        room[segment.gpa - first : segment.gpa - first + len(segment.data)] = segment.data
        for at in range(0, len(room), 4096):
            found[first + at] = bytes(room[at : at + 4096])
    return found


@pytest.mark.parametrize(
    "segments",
    [
        [(0x100000, 1, b"x")],
        [(0x100000, 4096, b"y" * 4096), (0x102000, 8192, b"")],
        [(0x100010, 4096 * 3, b"a" * 5000)],
        [(0x100FF0, 0x20, b"b" * 0x20), (0x103004, 100, b"c" * 40)],
        [(0x100000, 3 * MIB, b"d" * 4097)],
    ],
)
def test_contents_are_the_pages_in_ascending_pieces(segments: list[tuple[int, int, bytes]]) -> None:
    image = Image("x", 0x100000, tuple(Segment(*segment) for segment in segments))
    contents = boot.contents(SEV.boot_info, image)
    pages = {gpa + at: bytes(data[at : at + 4096]) for gpa, data in contents.items() for at in range(0, len(data), 4096)}
    assert pages == plain_pages(SEV.boot_info, image)
    assert list(contents) == sorted(contents)
    assert all(len(data) % 4096 == 0 for data in contents.values())
    digest = hashlib.sha256(b"".join(pages[gpa] for gpa in sorted(pages))).digest()
    assert predict(SEV, image).digest == digest


def test_a_large_image_is_not_copied() -> None:
    data = bytes(2 * MIB)
    contents = boot.contents(SEV.boot_info, Image("x", 0x100000, (Segment(0x100000, len(data), data),)))
    piece = contents[0x100000]
    assert isinstance(piece, memoryview) and piece.obj is data and len(piece) == len(data)


def test_regions_are_runs_with_a_hash_of_each_page() -> None:
    contents = {0x1000: b"a" * 4096, 0x2000: memoryview(b"b" * 8192), 0x9000: b"c" * 4096}
    first, second = regions(contents)
    assert (first.gpa, first.size, second.gpa, second.size) == (0x1000, 0x3000, 0x9000, 0x1000)
    assert first.sha256 == hashlib.sha256(b"a" * 4096 + b"b" * 8192).digest()
    assert first.pages == tuple(hashlib.sha256(letter * 4096).digest() for letter in (b"a", b"b", b"b"))
    assert (first.name, second.name) == ("GDT, IDT", "page tables")


# -- the prediction is what happens -------------------------------------------------------------------------------------------------------


@pytest.mark.gcc
@pytest.mark.model
@pytest.mark.parametrize(("name", "type"), SEV_GUESTS)
def test_prediction_is_what_a_run_measures(name: str, type: str, model_host: Any, tmp_path: Any) -> None:
    from vmm.saved_launch import load

    file = str(tmp_path / "launch.json")
    report = run_guest(GuestRequest(name, type, vcpus=2, arguments="nonce=1", memory=32 * MIB, host=model_host, save_launch=file))
    assert report.launch is not None and report.launch.match, report.message
    expected = predict(Setup(name, type, default_policy(type), 32 * MIB, 2, b"nonce=1"), load_guest(name, find_guest(name)))
    assert expected.digest == report.launch.digest
    found = load(file)
    assert compare(expected, found) is None
    assert (found.regions, found.setup, found.vmsas) == (expected.regions, expected.setup, expected.vmsas)
    assert len(found.vmsas or ()) == (2 if type == "sev-es" else 0)
    assert found.answer is not None
    assert (found.answer.measure, found.answer.nonce) == (report.launch.measure, report.launch.nonce)


@pytest.mark.model
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("vcpus", [1, 3])
def test_prediction_is_what_the_firmware_measures_on_sev_es(vcpus: int, model_host: Any) -> None:
    """The firmware's MAC is over VMSAs that the model's KVM made of its own vCPUs' registers."""
    image = flat.image(flat.HALT)
    with Machine(MachineConfig(image, model_host, "sev-es", 16 * MIB, vcpus, record=True)) as machine:
        found = machine.measurement("flat")
    expected = predict(replace(ES, vcpus=vcpus), image)
    assert found is not None and machine.launch is not None
    assert machine.launch.match
    assert compare(expected, found) is None
    assert found.setup == expected.setup
    assert found.vmsas is not None and len(found.vmsas) == vcpus


def test_vmsas_are_those_of_the_oracle() -> None:
    """sev-snp-measure's own struct, filled from docs/seams.md: what the VMM sets, with what KVM adds to it."""
    from sevsnpmeasure.vmsa import SevEsSaveArea, VmcbSeg

    for vcpu, page in enumerate(predicted_vmsas(ES, 0x100000)):
        area = SevEsSaveArea()
        area.cs = VmcbSeg(0x08, 0xA9B, 0xFFFFFFFF, 0)
        area.ds = area.es = area.fs = area.gs = area.ss = VmcbSeg(0x10, 0xC93, 0xFFFFFFFF, 0)
        area.gdtr, area.idtr = VmcbSeg(0, 0, 0x18 + 16 * 3 - 1, 0x1000), VmcbSeg(0, 0, 0xFFF, 0x2000)
        area.ldtr, area.tr = VmcbSeg(0, 2, 0, 0), VmcbSeg(0x18 + 16 * vcpu, 0x8B, 0x67, 0xC0000 + 128 * vcpu)
        area.efer, area.cr0, area.cr3, area.cr4 = 0xD01 | 0x1000, 0x80010033, 0x8000, 0x620 | 0x40
        area.dr6, area.dr7, area.rflags, area.rip = 0xFFFF0FF0, 0x400, 2, 0x100000
        area.rsp, area.rdi, area.rsi = 0x40000 + 0x2000 * (vcpu + 1) - 8, 0x4000, vcpu
        area.g_pat, area.xcr0, area.mxcsr, area.x87_fcw = 0x0007040600070406, 1, 0x1F80, 0x37F
        assert page == bytes(area)


def test_init_leaves_the_floating_point_part_out() -> None:
    image = flat.image(flat.HALT)
    new, old = predict(ES, image), predict(replace(ES, init=INIT), image)
    assert new.regions == old.regions
    assert compare(new, old) == "the VMSA of vCPU 0 differs first in mxcsr: 0x0, expected 0x1f80"
    assert predict(SEV, image).digest == predict(replace(SEV, init=INIT), image).digest, "without SEV-ES there is no difference"


def test_the_mac_is_the_published_vectors() -> None:
    empty = Measurement("prediction", replace(SEV, policy=0), hashlib.sha256().digest())
    tik, nonce = bytes.fromhex("66320db73158a35a255d051758e95ed4"), bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554")
    assert empty.mac(tik, nonce, (0, 0x12, 0x0F)).hex() == "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


# -- comparing ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": b"x"}, "region [0x4000, 0x5000) (boot info) differs first in page 0x4000 (boot info): SHA-256 "),
        ({"vcpus": 4}, "region [0x1000, 0x3000) (GDT, IDT) differs first in page 0x1000 (GDT)"),
        ({"c_bit": 47}, "region [0x4000, 0x5000) (boot info) differs"),
        ({"policy": 6}, "the policy is 0x6, expected 0x7"),
    ],
)
def test_the_first_difference_is_named(change: dict[str, Any], words: str) -> None:
    image = flat.image(flat.HALT)
    other = replace(ES, **change)
    difference = compare(predict(ES, image), predict(other, image))
    assert difference is not None and difference.startswith(words)
    (setting,) = setup_differences(ES, other)
    assert f"(--{next(iter(change)).replace('_', '-')}" in setting


def test_a_page_inside_the_image_is_named() -> None:
    code = bytearray(flat.HALT.ljust(3 * 4096, b"\x90"))
    expected = predict(SEV, flat.image(bytes(code)))
    code[2 * 4096 + 5] ^= 1
    difference = compare(expected, predict(SEV, flat.image(bytes(code))))
    assert difference is not None
    assert difference.startswith("region [0x100000, 0x103000) (image) differs first in page 0x102000 (image): SHA-256 ")
    assert hashlib.sha256(bytes(code[2 * 4096 :])).hexdigest() in difference


def test_regions_and_vmsas_that_are_missing_or_too_many() -> None:
    expected = predict(ES, flat.image(flat.HALT))
    assert expected.regions is not None and expected.vmsas is not None

    def found(**parts: Any) -> str | None:
        return compare(expected, replace(expected, digest=bytes(32), **parts))

    stacks = next(region for region in expected.regions if region.name == "stacks")
    without = tuple(region for region in expected.regions if region is not stacks)
    assert found(regions=without) == "region [0x40000, 0x46000) (stacks) was not measured"
    shorter = replace(stacks, size=0x2000, pages=stacks.pages[:2])
    assert found(regions=(*without, shorter)) == "region [0x40000, 0x46000) (stacks) ends at 0x42000"
    more = MeasuredRegion(0x200000, 0x1000, bytes(32), (bytes(32),))
    assert found(regions=(*expected.regions, more)) == "region [0x200000, 0x201000) (image) was measured too"
    assert found(vmsas=expected.vmsas[:1]) == "1 VMSAs were measured, expected 3"
    last = expected.vmsas[2]
    rip = MeasuredVmsa(2, bytes(32), {**last.fields, "rip": 0x100001, "xmm0": 5})
    assert found(vmsas=(*expected.vmsas[:2], rip)) == "the VMSA of vCPU 2 differs first in rip: 0x100001, expected 0x100000"
    assert "not of one piece" in str(found())
    assert "without regions" in str(found(regions=None, vmsas=None))
    assert compare(expected, replace(expected, regions=None, vmsas=None)) is None


# -- a large launch -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.usefixtures("no_leaks")
def test_a_large_launch_goes_in_chunks_with_progress(model_host: Any) -> None:
    from kvmapi.abi import kvm
    from kvmapi.system import System
    from vmm.gpamap import GpaMap
    from vmm.memory import GuestMemory

    page = bytes(range(256)) * 16
    data = memoryview(page * (40 * MIB // 4096))
    contents = {0x1000: page, 0x200000: data[: 20 * MIB], 0x200000 + 20 * MIB: data[20 * MIB :]}
    assert list(runs(contents)) == [(0x1000, 4096), (0x200000, 40 * MIB)]
    seen: list[tuple[int, int]] = []
    with System(model_host) as system, system.create_vm(kvm.KVM_X86_SEV_VM) as vm:
        memory = GuestMemory(vm, GpaMap())
        launch = SevLaunch(model_host, vm, None)
        try:
            memory.add_slot(0, 0, 64 * MIB)
            launch.pin(memory)
            for gpa, piece in contents.items():
                memory.write(gpa, piece)
            report = launch.run(memory, contents, progress=lambda done, total: seen.append((done, total)))
            assert memory.read(0x200000, 4096) != page, "encrypted in place"
        finally:
            launch.close()
            vm.close()
            memory.close()
    total = 4096 + 40 * MIB
    assert report.match
    assert report.digest == hashlib.sha256(page + bytes(data)).digest()
    assert seen == [(4096, total), (4096 + CHUNK, total), (4096 + 2 * CHUNK, total), (total, total)]


@pytest.mark.model
@pytest.mark.usefixtures("no_leaks")
def test_ctrl_c_in_a_launch_leaves_nothing(model_host: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Machine(MachineConfig(flat.image(flat.HALT), model_host, "sev", 16 * MIB, progress=interrupt))


def test_default_policies() -> None:
    assert (default_policy("sev"), default_policy("sev-es")) == (3, 7)
