"""Models in forms that run without PyTorch, each compared with PyTorch before it is written."""
