"""The fuzzer behind scripts/fuzz: ioctls from several threads (main.py, fuzzer.py), and hostile guests (snippets.py,
hostile.py).
"""
