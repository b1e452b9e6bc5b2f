"""Data sets, and what maps their records to the input of a model."""
