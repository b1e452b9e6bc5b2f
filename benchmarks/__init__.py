"""Measures the operator, the backbone and a detector beside what a user would pick instead."""
