"""`sevmm measure` as users type it: predictions as text and JSON, saved and compared; wrong usage in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmapi.measurement import expected_measure
from vmm import cli

pytestmark = pytest.mark.gcc
KEY = bytes(range(16))
NONCE = "4fbe0bedbad6c86ae8f68971d103e554"


@pytest.fixture(autouse=True)
def own_platform(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's model keeps its platform in the user's state folder; not in this user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def key(tmp_path: Path) -> str:
    (tmp_path / "tik.bin").write_bytes(KEY)
    return str(tmp_path / "tik.bin")


def measure(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["measure", *argv])
    return code, *capfd.readouterr()


def test_text(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = measure(capfd, "hello")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "guest       hello, type sev, KVM_SEV_INIT2"
    assert lines[2] == "launch      policy 0x3 (no debugging, no key sharing)"
    assert lines[3].startswith("regions     [0x001000, 0x003000)    8 KiB  ") and lines[3].endswith("  GDT, IDT")
    assert lines[-1].startswith("digest      ") and len(lines[-1].split()[1]) == 64
    assert len(lines) == 10
    assert "\x1b" not in out


def test_sev_es_shows_each_vmsa(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = measure(capfd, "hello", "--type", "sev-es", "--vcpus", "2", "--init", "init")
    assert code == 0
    assert err == ""
    assert out.startswith("guest       hello, type sev-es, KVM_SEV_ES_INIT\n")
    assert "policy 0x7 (no debugging, no key sharing, SEV-ES)" in out
    assert "efer=0x1d01" in out and "mxcsr" not in out
    assert "as vCPU 0, but  tr.selector=0x28  tr.base=0xc0080  rsp=0x43ff8  rsi=0x1\n" in out
    assert max(map(len, out.splitlines())) < 125


def test_the_mac(capfd: pytest.CaptureFixture[str], key: str) -> None:
    _, out, _ = measure(capfd, "hello", "--tik", key, "--nonce", NONCE, "--api", "0.24", "--build", "15", "--policy", "3")
    digest = bytes.fromhex(out.split("digest")[1].split()[0])
    mac = expected_measure(KEY, digest, bytes.fromhex(NONCE), policy=3, api_major=0, api_minor=24, build=15)
    assert out.endswith(f"measure     {mac.hex()}  (for nonce {NONCE}, API 0.24 build 15)\n")


def test_json_is_what_save_writes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = measure(capfd, "hello", "--json", "--save", str(tmp_path / "p.json"))
    assert (code, err) == (0, "")
    assert out == (tmp_path / "p.json").read_text()
    assert json.loads(out)["kind"] == "prediction"
    code, out, _ = measure(capfd, "hello", "--verify", str(tmp_path / "p.json"))
    assert code == 0
    assert out.startswith(f"same: {tmp_path / 'p.json'} is a prediction of what hello should be, digest ")
    assert out.count("\n") == 1


@pytest.mark.model
def test_verify_a_run(capfd: pytest.CaptureFixture[str], tmp_path: Path, key: str) -> None:
    saved = str(tmp_path / "l.json")
    assert cli.main(["run", "hello", "--type", "sev", "--on", "model", "--vcpus", "2", "--save-launch", saved]) == 0
    capfd.readouterr()
    code, out, err = measure(capfd, "hello", "--vcpus", "2", "--verify", saved)
    assert (code, err) == (0, "")
    assert (
        out.splitlines()[1]
        == "the firmware's MAC was not checked: a session's owner does that with --tik FILE (sevmm run checks its own, and keeps no key)"
    )
    code, out, _ = measure(capfd, "hello", "--memory", "128M", "--verify", saved)
    assert code == 1
    assert out.startswith("differs: region [0x1000, 0x3000) (GDT, IDT) differs first in page 0x1000 (GDT): SHA-256 ")
    assert out.splitlines()[1:] == ["  memory 64 MiB there, 128 MiB here (--memory 64M)", "  vCPUs 2 there, 1 here (--vcpus 2)"]
    code, out, _ = measure(capfd, "hello", "--vcpus", "2", "--tik", key, "--verify", saved)
    assert code == 1, "the same bytes, and another owner's key"
    assert out.splitlines()[1].startswith("MAC WRONG: ")
    code, out, _ = measure(capfd, "hello", "--verify", saved, "--json")
    verdict = json.loads(out)
    assert (code, verdict["same"], verdict["mac"]) == (1, False, None)
    assert verdict["settings"] == ["vCPUs 2 there, 1 here (--vcpus 2)"]


def test_verify_checks_the_mac(capfd: pytest.CaptureFixture[str], tmp_path: Path, key: str) -> None:
    saved = tmp_path / "l.json"
    measure(capfd, "hello", "--save", str(saved))
    data = json.loads(saved.read_text())
    mac = expected_measure(KEY, bytes.fromhex(data["digest"]), bytes.fromhex(NONCE), policy=3, api_major=0, api_minor=24, build=15)
    data.update(kind="launch", answer={"version": [0, 24, 15], "nonce": NONCE, "measure": mac.hex()})
    saved.write_text(json.dumps(data))
    code, out, _ = measure(capfd, "hello", "--tik", key, "--verify", str(saved))
    assert (code, out.splitlines()[1]) == (0, "MAC right: the firmware that has this key measured exactly that")
    code, out, _ = measure(capfd, "hello", "--tik", key, "--verify", str(saved), "--api", "0.25", "--build", "15")
    assert (code, out.splitlines()[1][:9]) == (1, "MAC WRONG")
    data["answer"]["version"] = None
    saved.write_text(json.dumps(data))
    code, out, err = measure(capfd, "hello", "--tik", key, "--verify", str(saved))
    assert (code, out) == (2, "")
    assert "does not say which firmware answered: add --api and --build" in err
    assert measure(capfd, "hello", "--tik", key, "--verify", str(saved), "--api", "0.24", "--build", "15")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nosuch"], "neither a bundled guest"),
        (["./no/such"], "no such file"),
        (["hello", "--type", "plain"], "invalid choice: 'plain'"),
        (["multiboot"], "runs on type plain only"),
        (["hello", "--memory", "1M"], "too little"),
        (["hello", "--verify", "/no/such"], "no such file"),
        (["hello", "--save", "/no/such/file"], "there is no folder /no/such"),
        (["hello", "--nonce", NONCE], "--nonce without --tik"),
        (["hello", "--tik", "KEY"], "all of --tik, --nonce, --api and --build"),
        (["hello", "--tik", "/no/such", "--nonce", NONCE, "--api", "0.24", "--build", "1"], "cannot be read: no such file"),
        (["hello", "--tik", "/dev/null", "--nonce", NONCE, "--api", "0.24", "--build", "1"], "16 bytes of an integrity key"),
        (["hello", "--nonce", "00"], "32 hex digits"),
        (["hello", "--api", "24"], "for example 0.24"),
        (["hello", "--api", "0.256"], "for example 0.24"),
        (["hello", "--build", "-1"], "0 to 255"),
        (["hello", "--build", "256"], "0 to 255"),
        (["hello", "--c-bit", "12"], "36 to 51"),
        (["hello", "--features", "x"], "features in hex"),
    ],
)
def test_what_cannot_be_is_one_line(capfd: pytest.CaptureFixture[str], key: str, argv: list[str], words: str) -> None:
    code, out, err = measure(capfd, *(key if word == "KEY" else word for word in argv))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_it_opens_no_device(tree: Path, tmp_path: Path) -> None:
    """In a process of its own that lists what it opened."""
    program = f"""
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
from vmm.cli import main
code = main(["measure", "hello", "--type", "sev-es", "--save", {str(tmp_path / "p.json")!r}])
loaded = [name for name in ("kvmapi.kernel", "kvmapi.model.host", "unicorn", "cryptography") if name in sys.modules]
print(code, [name for name in opened if name.startswith("/dev")], loaded)
"""
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 [] []"


def test_no_compiler(tree: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(tree), "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "vmm.cli", "measure", "hello"], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert "apt install gcc" in done.stderr and done.stderr.count("\n") == 1
