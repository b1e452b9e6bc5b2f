"""Checks and links COCO, ADE20K, Cityscapes and ImageNet, and validates COCO-style annotations.

Needs no framework, and changes no file that it has not made itself.
"""
