"""Exit statuses of the process that are not a verb's own. `RunReport.exit_status` decides those of a run."""

OK = 0
USAGE = 2
UNSUPPORTED = 4
"""This host cannot (as kselftest's skip)."""

VMM_FAILED = 70
"""EX_SOFTWARE of sysexits.h."""

INTERRUPTED = 130
"""128 + SIGINT, as shells say it."""

BROKEN_PIPE = 141
"""128 + SIGPIPE."""
