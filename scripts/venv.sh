# shellcheck shell=sh
# What scripts/sevmm and scripts/test share: find the virtual environment that
# belongs to this tree, or have it made.
#
#   1. The environment lives outside the tree, in $XDG_CACHE_HOME/sevmm (or
#      ~/.cache/sevmm), because a clone may be read-only, shared or thrown away.
#   2. Its name carries a checksum of pyproject.toml: changed dependencies mean
#      another environment, and two clones with the same ones share it.
#   3. It holds the dependencies only. The project itself always runs from the
#      tree that the launcher was called in, so nothing is installed twice.
#   4. It counts as finished when its file `complete` is there, which
#      bootstrap.py writes last: a half-made one is made again.
#
# The usual start (everything there) costs one `cksum` and one `exec`.

say() { printf '%s: %s\n' "$launcher" "$*" >&2; }

# A Python of at least 3.11: $SEVMM_PYTHON, or the first that answers to a usual
# name, preferring one that can make virtual environments.
find_python() {
    if [ -n "${SEVMM_PYTHON:-}" ]; then
        if ! "$SEVMM_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            say "SEVMM_PYTHON=$SEVMM_PYTHON is not a Python of version 3.11 or later"
            return 1
        fi
        printf '%s\n' "$SEVMM_PYTHON"
        return 0
    fi
    second_best=
    for candidate in python3.13 python3.12 python3.11 python3.14 python3; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
        [ -n "$second_best" ] || second_best=$candidate
    done
    if [ -n "$second_best" ]; then
        printf '%s\n' "$second_best"   # bootstrap.py says what it lacks
        return 0
    fi
    say "no Python of version 3.11 or later found (tried python3.13, 3.12, 3.11, 3.14, python3)"
    say "get it: apt install python3 python3-venv, or set SEVMM_PYTHON to an interpreter"
    return 1
}

# use_venv KIND: sets $python to the interpreter of the environment. KIND is
# `run` (what sevmm needs) or `dev` (that and what its tests need).
use_venv() {
    if [ -n "${XDG_CACHE_HOME:-}" ]; then
        cache=$XDG_CACHE_HOME/sevmm
    elif [ -n "${HOME:-}" ]; then
        cache=$HOME/.cache/sevmm
    else
        say "neither HOME nor XDG_CACHE_HOME is set: nowhere to keep the Python environment"
        return 70
    fi
    key=$({ cat "$tree/pyproject.toml" && printf '%s' "${SEVMM_PYTHON:-}"; } | cksum) || return 70
    key=${key%% *}
    venv=$cache/venv-$1-$key
    python=$venv/bin/python
    if [ ! -f "$venv/complete" ] || [ ! -x "$python" ]; then
        base=$(find_python) || return 70
        "$base" "$tree/scripts/bootstrap.py" --name "$launcher" --tree "$tree" --venv "$venv" --kind "$1" || return $?
    fi
    # A tree that cannot hold compiled modules would be compiled at every start.
    [ -w "$tree/vmm" ] || export PYTHONPYCACHEPREFIX="$cache/pycache"
}
