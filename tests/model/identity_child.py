"""A platform with a store as a process of its own, for test_identity_memory: it uses each of its keys, then stands still.

Lines on stdout: "loaded" after the keys of the store were used, "changed" after new ones took their place and were used
too. It goes on at a line on stdin, and ends when stdin does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvmapi.model.sev.identity import Identity
from kvmapi.model.sev.store import Store
from kvmapi.model.sev.vault import Vault
from kvmapi.wiping import wipe


def use(identity: Identity) -> None:
    identity.sign_with_pek(b"a report")
    z = identity.shared_secret(identity.pdh_certificate)
    wipe(z)


def main() -> None:
    identity = Identity(Vault(), Store(Path(sys.argv[1])))
    use(identity)
    print("loaded", flush=True)
    sys.stdin.readline()
    identity.factory_reset()
    use(identity)
    print("changed", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
