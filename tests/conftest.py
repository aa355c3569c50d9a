"""What all tests share: markers that say what a test needs, `--require`, the hosts, and the check that nothing leaks.

A test that needs something this machine may not have carries a marker (`kvm`, `sev`, `gcc`, …, listed in pyproject.toml). Where
it is missing the test is skipped, and the skip text is the doctor's fact: what was asked, what answered, how to get it.
`--require kvm,gcc` turns skips of these kinds into failures, for a machine that is known to have them.

Hosts: `kernel_host`, `model_host`, and `any_host`, which runs a test once on each host that is there. Conformance tests use `any_host`: the
model is judged by the same lines as the kernel.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import urllib.parse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DOCTOR_KINDS = {
    "kvm": "kvm", "sev": "sev", "sw_protected": "sw-protected", "hypercall": "hypercall", "model": "model", "gcc": "gcc",
}  # fmt: skip
"""Marker -> what vmm.doctor.reason_missing calls it."""

KINDS = (*DOCTOR_KINDS, "network", "lab")

IN_LAB = os.environ.get("SEVMM_IN_LAB") == "1"
PATIENCE = 10 if IN_LAB else 1
"""Limits of time are multiplied by this: the lab's CPU is emulated, about ten times slower."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if pluginmanager.has_plugin("vmm.selftests.plugin"):  # where the package is installed, its plugin has the option
        return
    parser.addoption(
        "--require", action="append", default=[], metavar="KIND[,KIND…]",
        help=f"fail instead of skipping where this is missing; of: {', '.join(KINDS)}",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    unknown = _required(config) - set(KINDS)
    if unknown:
        raise pytest.UsageError(f"--require {', '.join(sorted(unknown))}: not one of {', '.join(KINDS)}")


def _required(config: pytest.Config) -> set[str]:
    """Kinds named by --require; sev-es and sw-protected may be written with either dash."""
    return {kind.strip().replace("-", "_") for text in config.getoption("--require") for kind in text.split(",") if kind.strip()}


@cache
def missing(kind: str) -> str | None:
    """Why `kind` is not here and how to get it; None when it is. Asked once per session."""
    if kind == "network":
        return _no_network()
    if kind == "lab":
        return None if IN_LAB else _no_lab()
    from vmm.doctor import reason_missing

    reason = reason_missing(DOCTOR_KINDS[kind])
    return None if reason is None else f"needs {DOCTOR_KINDS[kind]}: {reason}"


def _no_network() -> str | None:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    proxy = os.environ.get("PIP_PROXY") or os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    target = urllib.parse.urlsplit(proxy or index)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=5).close()
    except OSError as error:
        return f"needs network: {target.hostname}:{port} cannot be reached ({error}); get it: a network, or PIP_INDEX_URL of a mirror"
    return None


def _no_lab() -> str | None:
    """A test of kind `lab` runs inside it, or starts it."""
    status = subprocess.run([str(Path(__file__).parents[1] / "scripts" / "lab"), "status"], capture_output=True, text=True, check=False)
    last = (status.stdout.strip().splitlines() or ["scripts/lab status says nothing"])[-1]
    return None if status.returncode == 0 else f"needs the lab: {last}; get it: scripts/lab setup"


def require(config: pytest.Config, kind: str) -> None:
    """Skip the running test when `kind` is missing, or fail it when --require asks for `kind`."""
    reason = missing(kind)
    if reason is None:
        return
    if kind in _required(config):
        pytest.fail(f"--require {kind}, but it {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for kind in KINDS:
        if item.get_closest_marker(kind) is not None:
            require(item.config, kind)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The command line's model keeps a platform in the user's state directory: tests have one of their own."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def kernel_host(request: pytest.FixtureRequest) -> Any:
    """The machine's own kernel behind the seam; skips where /dev/kvm does not open."""
    require(request.config, "kvm")
    return _kernel()


@pytest.fixture
def model_host(request: pytest.FixtureRequest) -> Any:
    """A fresh software model behind the seam."""
    require(request.config, "model")
    return _model()


@pytest.fixture(params=["kernel", "model"])
def any_host(request: pytest.FixtureRequest) -> Any:
    """Each host that is there, in turn: what passes on the kernel must pass on the model."""
    require(request.config, {"kernel": "kvm", "model": "model"}[request.param])
    return _kernel() if request.param == "kernel" else _model()


def _kernel() -> Any:
    from kvmapi.kernel import KernelHost

    return KernelHost()


def _model() -> Any:
    from kvmapi.model.host import ModelHost

    host = ModelHost()
    _ = host.platform.firmware  # its vault lives as long as the host, and is there before a test looks for leaks
    return host


def open_fds() -> dict[int, str]:
    """This process's fds and what they are, but the one that reads the list, and the one that the model's first engine
    opens for good.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass  # the directory's own fd, closed by now
    return {fd: what for fd, what in found.items() if what != f"/proc/{os.getpid()}/mem"}


_MAPPED = ("memfd:", "anon_inode:", "secretmem", "/dev/kvm", "/dev/zero")


def device_mappings() -> list[str]:
    """Mappings of what a VMM maps: memfds, guest_memfds, anonymous inodes of KVM, the model's secret memory. Sorted, one line each."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(line.split(None, 5)[5] for line in lines if any(word in line for word in _MAPPED))


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test leaves behind the fds and the VMM's kinds of mappings that it found, no more."""
    gc.collect()
    fds, mappings = open_fds(), device_mappings()
    yield
    request.node.funcargs.clear()  # pytest holds hosts and what they map until after this
    gc.collect()
    left = {fd: name for fd, name in open_fds().items() if fds.get(fd) != name}
    assert not left, f"fds left open: {left}"
    assert device_mappings() == mappings, "mappings left behind (or removed)"


@pytest.fixture
def tree() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]
