"""Counts the parts of a model and shows what ELSA attends to in an image."""
