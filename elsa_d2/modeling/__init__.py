"""Backbones, heads and test-time augmentation."""
