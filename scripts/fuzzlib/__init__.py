"""The fuzzer behind scripts/fuzz: ioctls from several threads (main.py, fuzzer.py), hostile guests (snippets.py, hostile.py)
and sequences of SEV commands (sev.py), the last two in many processes (processes.py).
"""
