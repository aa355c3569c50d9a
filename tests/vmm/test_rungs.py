"""Which host runs a guest, and the sentence that says why."""

import errno
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls
from vmm import probe, rungs
from vmm.rungs import Unsupported, choose


class Kernel:
    """A made-up kernel: VM types by mask, and an errno for each device that does not open."""

    name = "kernel"

    def __init__(self, types: int = 1, **refused: int) -> None:
        self.types = types
        self.refused = refused

    def open(self, path: str, flags: int) -> int:
        code = self.refused.get(path.rsplit("/", 1)[1])
        if code:
            raise OSError(code, "Refused", path)
        return 100

    def close(self, fd: int) -> None:
        assert fd == 100

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        assert (request, arg) == (ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_VM_TYPES)
        return self.types


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a made-up kernel in the place of the real one; hypercalls arrive unless said otherwise."""

    def put(hypercalls: bool = True, **more: Any) -> Kernel:
        made = Kernel(**more)
        monkeypatch.setattr("kvmapi.kernel.KernelHost", lambda: made)
        monkeypatch.setattr(probe, "hypercall_exits", lambda host: hypercalls)
        return made

    return put


def test_auto_takes_a_kernel_that_can(kernel: Any) -> None:
    host = kernel(types=0b111)
    for type in ("plain", "sw-protected", "sev"):
        rung = choose(type, needs=frozenset({"hypercall"}))
        assert (rung.name, rung.host) == ("kernel", host)
        assert type in rung.reason
        assert "hypercalls" in rung.reason


@pytest.mark.model
@pytest.mark.parametrize(
    ("type", "more", "word"),
    [
        ("sev", {"types": 1}, "no VM type sev"),
        ("sw-protected", {"types": 0}, "no VM type sw-protected"),
        ("plain", {"kvm": errno.EACCES}, "/dev/kvm cannot be used"),
        ("sev", {"types": 7, "sev": errno.ENOENT}, "/dev/sev cannot be opened"),
        ("plain", {"hypercalls": False}, "hypercalls"),
    ],
)
def test_auto_takes_the_model_otherwise_and_says_why(kernel: Any, type: str, more: dict[str, Any], word: str) -> None:
    kernel(**more)
    rung = choose(type, needs=frozenset({"hypercall"}))
    assert rung.name == "model"
    assert word in rung.reason
    with pytest.raises(Unsupported, match=word) as caught:
        choose(type, "kernel", frozenset({"hypercall"}))
    assert caught.value.remedy


def test_a_kernel_without_the_capability_has_plain_vms(kernel: Any) -> None:
    kernel(types=0)
    assert choose("plain").name == "kernel"


@pytest.mark.model
def test_the_model_when_it_is_asked_for(kernel: Any) -> None:
    kernel(types=0b111)
    assert choose("sev", "model").name == "model"


def test_a_model_that_does_not_load_is_unsupported_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "kvmapi.model.host", None)
    with pytest.raises(Unsupported, match="cannot be loaded") as caught:
        choose("plain", "model")
    assert "pip install" in caught.value.remedy


@pytest.mark.parametrize("what", [("tdx", "auto", frozenset()), ("plain", "moon", frozenset()), ("plain", "auto", frozenset({"luck"}))])
def test_what_does_not_exist_is_a_value_error(what: Any) -> None:
    with pytest.raises(ValueError, match="exist"):
        choose(*what)


def test_types_have_the_kernels_numbers() -> None:
    from kvmapi.abi import kvm

    numbers = (kvm.KVM_X86_DEFAULT_VM, kvm.KVM_X86_SW_PROTECTED_VM, kvm.KVM_X86_SEV_VM, kvm.KVM_X86_SEV_ES_VM)
    assert tuple(rungs.TYPES.values()) == numbers
