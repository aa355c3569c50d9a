"""Mutation testing of the selftests, behind scripts/mutate: the table of rules to break (rules.py), the import hook that breaks
one (hook.py), a process for each (trial.py), and the command (main.py).
"""
