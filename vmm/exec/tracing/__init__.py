"""ptrace(2): one thread that traces and waits (tracer), what it does with a stopped thread (ptrace), CPUID's answers (cpuid)."""
