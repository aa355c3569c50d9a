"""Which sevmm this is: asked for by `--version` and written into recordings."""

from __future__ import annotations

from pathlib import Path


def version() -> str:
    """The version of this tree (its pyproject.toml), or of the installed distribution."""
    import tomllib

    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        if project["name"] == "sevmm":
            return str(project["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass  # not a tree: an installed wheel
    from importlib import metadata

    try:
        return metadata.version("sevmm")
    except metadata.PackageNotFoundError:
        return "of unknown version (neither a source tree nor an installed distribution)"
