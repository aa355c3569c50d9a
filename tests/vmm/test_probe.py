"""The probe: a guest of two instructions says what a capability is worth, once per boot."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls
from vmm import probe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sevmm" / "probes.json"


@pytest.mark.usefixtures("no_leaks")
def test_the_model_delivers_hypercalls_and_is_not_remembered(model_host: Any, cache: Path) -> None:
    assert probe.hypercall_exits(model_host)
    assert not cache.exists()


@pytest.mark.usefixtures("no_leaks")
def test_the_kernel_gives_an_answer_soon_and_it_is_remembered(kernel_host: Any, cache: Path) -> None:
    began = time.monotonic()
    first = probe.hypercall_exits(kernel_host)
    assert time.monotonic() - began < 2
    assert list(json.loads(cache.read_text()).values()) == [first]
    cache.write_text(cache.read_text().replace(str(first).lower(), str(not first).lower()))
    assert probe.hypercall_exits(kernel_host) is not first, "the second answer is the remembered one"
    assert probe.hypercall_exits(kernel_host, cache=False) is first


class NoCapability:
    """A host of which only the capability question is answered, with 0."""

    name = "kernel"

    def __init__(self) -> None:
        self.closed: list[int] = []

    def open(self, path: str, flags: int) -> int:
        return 100

    def close(self, fd: int) -> None:
        self.closed.append(fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if request == ioctls.KVM_CREATE_VM:
            return 101
        assert (request, arg) == (ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_EXIT_HYPERCALL)
        return 0


def test_without_the_capability_no_guest_is_run(cache: Path) -> None:
    host = NoCapability()
    assert not probe.hypercall_exits(host)  # type: ignore[arg-type]
    assert host.closed == [101, 100]


def test_a_host_that_does_not_open_is_a_no_and_is_not_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = NoCapability()
    monkeypatch.setattr(host, "open", lambda path, flags: os.open("/no/such/device", flags))
    assert not probe.hypercall_exits(host)  # type: ignore[arg-type]
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}'])
def test_a_damaged_cache_is_as_good_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert not probe.hypercall_exits(NoCapability())  # type: ignore[arg-type]
    assert list(json.loads(cache.read_text()).values()) == [False]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sevmm").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not probe.hypercall_exits(NoCapability())  # type: ignore[arg-type]
