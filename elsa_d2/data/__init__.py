"""Data sets, and images on their way to a model."""
