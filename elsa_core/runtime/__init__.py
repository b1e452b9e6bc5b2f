"""Shared by all commands: errors, atomic writes, preemption, command lines."""
