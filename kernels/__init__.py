"""Kernels of the CopyNCE loss, one operator a file, each beside its plain PyTorch twin.

The twins import torch alone: they work where Triton cannot be imported.
"""
