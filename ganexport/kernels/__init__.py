"""Fused CUDA kernels and their plain-torch references; importing this package imports no torch."""

from ganexport.kernels._library import Status, status

__all__ = ["Status", "status"]
