"""The newest linux-source package that the configured mirror offers, and the tree in it.

1. `resolve`   ask the mirror, over the suites that are configured and (Debian) the newer ones beside them, through a private apt root:
               lists, cache and sources of its own, so that /etc/apt stays as it is and no suite is mixed into the machine. The keys are
               the machine's own. Release candidates are left out. The answer is kept: a lab does not change because the mirror did;
               `setup --update` asks again. Newer suites are asked under their code names, which the first of two updates learns: a
               mirror that caches was seen to serve `stable-backports` three weeks older than the same suite under its code name.
2. `download`  the .deb, checked by apt against the signed lists; apt goes on with a part that an interruption left.
3. `unpack`    the tarball in it. The tree is only read afterwards (kernel and tests are built outside of it), and can be dropped and
               unpacked again at any time.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

from lablib.cache import Result, Step, cache_root, remove
from lablib.words import Failure, Progress, run_logged

NEWER_SUITES = {"Debian": ("stable", "stable-updates", "stable-backports", "testing", "unstable")}
"""Origin of a mirror -> suites to look at besides the configured ones, by names that do not age."""

ALSO = re.compile(r"Signed-By:\s*(/\S+)|signed-by=(/[^\s\]]+)", re.IGNORECASE)


def resolve_step() -> Step:
    """Which package: one answer per recipe, until asked again."""
    return Step("resolve", 1, {"package": "linux-source", "newest": "release"})


def resolve() -> Result:
    """{package, version, suites}: kept from an earlier time, or asked now."""
    step = resolve_step()
    return step.run(functools.partial(_ask_mirror, step))


def forget_resolution() -> None:
    """Ask the mirror again the next time."""
    remove(resolve_step().directory / "complete.json")


def _ask_mirror(step: Step, progress: Progress) -> Result:
    suites = _update(step, step.log, progress)
    base = _apt_options(step)
    names = subprocess.run(["apt-cache", *base, "pkgnames", "linux-source-"], capture_output=True, text=True, check=False)
    candidates = [name for name in names.stdout.split() if version_of(name)]
    madison = subprocess.run(["apt-cache", *base, "madison", *candidates], capture_output=True, text=True, check=False)
    found = newest(madison.stdout)
    if found is None:
        raise Failure(f"no linux-source package in {', '.join(suites)} of the configured mirror, or it cannot be reached; see {step.log}")
    package, version = found
    progress.update(f"{package} {version}")
    return {"package": package, "version": version, "suites": suites}


def _update(step: Step, log: Path, progress: Progress) -> list[str]:
    """Bring the private root's lists up to date; gives the suites. `step` is the resolve step, which owns them."""
    options = _apt_options(step)
    configured, newer = source_entries(_index_targets())
    if not configured:
        raise Failure("apt has no lists, so the mirror is not known\nget it: apt-get update, with Debian's archive in its sources")
    _write_sources(step, newer)
    _apt_update([*options, "-o", "Acquire::IndexTargets::deb::Packages::DefaultEnabled=false"], log, progress)
    lists = step.directory / "apt" / "state" / "lists"
    named = {(site, code) for site, suite in newer if (code := code_name(lists, suite))}
    entries = list(dict.fromkeys([*configured, *sorted(named)]))
    _write_sources(step, entries)
    _apt_update(options, log, progress)
    return list(dict.fromkeys(suite for _, suite in entries))


def _apt_update(options: list[str], log: Path, progress: Progress) -> None:
    """A suite that this mirror lacks is an error to apt and none to us, if another suite has the package."""
    try:
        run_logged(["apt-get", *options, "update"], log, progress)
    except Failure as failure:
        with log.open("a") as file:
            file.write(f"{failure}\n")


def code_name(lists: Path, suite: str) -> str:
    """The code name that the Release file of `suite` states; empty when there is no such file."""
    for file in [*lists.glob(f"*_dists_{suite}_InRelease"), *lists.glob(f"*_dists_{suite}_Release")]:
        match = re.search(r"^Codename: (\S+)$", file.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match[1]
    return ""


def version_of(package: str) -> tuple[int, ...]:
    """(7, 3) for linux-source-7.3; () for anything else, such as a flavour."""
    match = re.fullmatch(r"linux-source-(\d+(?:\.\d+)+)", package)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def newest(madison: str) -> tuple[str, str] | None:
    """Package and version of the newest release in `apt-cache madison`'s table; a package's own versions come newest first."""
    best: tuple[tuple[int, ...], str, str] | None = None
    for line in madison.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) < 3 or "~rc" in fields[1] or not version_of(fields[0]):
            continue
        if best is None or version_of(fields[0]) > best[0]:
            best = (version_of(fields[0]), fields[0], fields[1])
    return None if best is None else best[1:]


def _apt_options(step: Step) -> list[str]:
    """A private apt root in the step's directory; the machine's own settings (proxy, keys) stay, its hooks after an update do not."""
    root = step.directory / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    config = root / "apt.conf"
    config.write_text(
        "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n#clear Acquire::IndexTargets::deb::DEP-11;\n"
        f'Dir::Etc::sourcelist "{root}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State "{root}/state";\nDir::State::status "{root}/status";\nDir::Cache "{root}/cache";\n'
        'APT::Sandbox::User "root";\nAcquire::Languages "none";\nAcquire::Retries "3";\n'
    )
    return ["-q", "-c", str(config)]


def _index_targets() -> str:
    """What apt is configured with: one line "site|suite|component|origin" per list that it has."""
    fields = "$(SITE)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
    command = ["apt-get", "indextargets", "--format", fields, "Identifier: Packages", "Created-By: Packages"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def source_entries(targets: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Configured (site, suite) pairs that have a component main, and pairs of the newer suites that their sites may have."""
    configured: list[tuple[str, str]] = []
    newer: list[tuple[str, str]] = []
    for line in targets.splitlines():
        fields = line.split("|")
        if len(fields) != 4 or fields[2] != "main" or "://" not in fields[0]:
            continue
        site, suite, _, origin = fields
        configured.append((site, suite))
        if "security" not in suite:
            newer += [(site, name) for name in NEWER_SUITES.get(origin, ())]
    return list(dict.fromkeys(configured)), list(dict.fromkeys(newer))


def _write_sources(step: Step, entries: list[tuple[str, str]]) -> None:
    keys = _keyrings()
    option = f" [signed-by={','.join(keys)}]" if keys else ""
    text = "".join(f"deb{option} {site} {suite} main\n" for site, suite in entries)
    (step.directory / "apt" / "sources.list").write_text(text)


def _keyrings() -> list[str]:
    """Key files that the machine's sources name; none when they rely on apt's trusted ones."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *folder.glob("sources.list.d/*.list"), *folder.glob("sources.list.d/*.sources")]
    found: list[str] = []
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        found += [first or second for first, second in ALSO.findall(text)]
    return list(dict.fromkeys(key for key in found if Path(key).exists()))


def source_step(resolved: Result) -> Step:
    """The package file and, while it is needed, the tree."""
    return Step("source", 1, {"package": str(resolved["package"]), "version": str(resolved["version"])})


def tree(resolved: Result) -> Path:
    """The unpacked source, made when it is not there."""
    step = source_step(resolved)
    unpacked = step.directory / "tree"
    if step.result() is not None and not unpacked.exists():
        remove(step.directory / "complete.json")  # dropped since: unpack again from the kept .deb
    step.run(functools.partial(_fetch, step, resolved))
    return unpacked


def _fetch(step: Step, resolved: Result, progress: Progress) -> Result:
    deb = step.directory / "linux-source.deb"
    if not deb.exists():
        _download(step, resolved, deb, progress)
    if shutil.disk_usage(step.directory).free < 4 << 30:
        raise Failure(f"{step.directory} has less than 4 GiB left, and the source and its build need that")
    partial = step.directory / "tree.partial"
    remove(partial)
    partial.mkdir()
    progress.update("unpacking")
    script = (
        'set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -xO --wildcards "*/linux-source-*.tar.xz" |'
        ' tar -xJ --strip-components=1 -C "$2"'
    )
    try:
        run_logged(["bash", "-c", script, "unpack", str(deb), str(partial)], step.log, progress)
    except Failure:
        remove(deb)  # nothing else says whether the file or the disk was at fault
        raise
    remove(step.directory / "tree")
    partial.rename(step.directory / "tree")
    return {"deb_bytes": deb.stat().st_size}


def _download(step: Step, resolved: Result, deb: Path, progress: Progress) -> None:
    lists = resolve_step()
    folder = step.directory / "download"
    folder.mkdir(exist_ok=True)
    options = _apt_options(lists)
    wanted = f"{resolved['package']}={resolved['version']}"
    progress.update(f"downloading {wanted}")
    command = ["apt-get", *options, "download", wanted]
    try:
        run_logged(command, step.log, progress, cwd=folder)
    except Failure:
        # The lists may be older than the mirror's files, or not have come along with a copied cache.
        try:
            _update(lists, step.log, progress)
            run_logged(command, step.log, progress, cwd=folder)
        except Failure as failure:
            raise Failure(f"{failure}\nif the mirror has dropped {wanted}: scripts/lab setup --update") from failure
    files = sorted(folder.glob("*.deb"))
    if not files:
        raise Failure(f"apt-get download {wanted} left no file in {folder}")
    files[-1].rename(deb)
    remove(folder)


def drop_trees() -> list[Path]:
    """Remove unpacked trees; the package files stay, and the next build unpacks again."""
    found = [path for path in cache_root().glob("source-*/tree*") if path.is_dir()]
    for path in found:
        remove(path)
    return found
