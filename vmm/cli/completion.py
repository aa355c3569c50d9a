"""`sevmm completion bash|zsh`: a completion script made from the grammar by shtab.

    eval "$(sevmm completion bash)"          # in ~/.bashrc
    sevmm completion zsh > _sevmm            # into a directory of $fpath

The names of the bundled guests are written into the script, so completing one starts nothing.
"""

from __future__ import annotations

import argparse

from vmm.cli import status
from vmm.cli.parser import build_parser

_BASH = """\
_sevmm_guests() {{
  compgen -W "{names}" -- "$1"
  compgen -f -- "$1"
}}
_sevmm_program() {{
  compgen -c -- "$1"
  compgen -f -- "$1"
}}
"""
_ZSH = """\
_sevmm_guests() {{
  local -a names
  names=({names})
  _describe 'bundled guest' names
  _files
}}
_sevmm_program() {{
  _command_names -e
  _files
}}
"""


def run(options: argparse.Namespace) -> int:
    """Print the script for `options.shell`."""
    import shtab

    from vmm.cli.guests import names

    text = " ".join(names())
    preamble = {"bash": _BASH.format(names=text), "zsh": _ZSH.format(names=text)}
    script: str = shtab.complete(build_parser(), shell=options.shell, preamble=preamble)  # type: ignore[arg-type]  # its hint is too narrow
    print(script)
    return status.OK
