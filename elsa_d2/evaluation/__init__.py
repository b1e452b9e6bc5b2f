"""Evaluators, whose files are whole or not there."""
