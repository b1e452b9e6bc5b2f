"""Evaluators that write their files completely or not at all."""
