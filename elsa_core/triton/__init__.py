"""The operator by Triton, for GPUs without compiled kernels: no compiler of the user's is needed.

Import `elsa_core.triton.operator` only where Triton is to be used: it imports Triton.
"""
