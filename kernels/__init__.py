"""Kernels of the CopyNCE loss, one operator a file or folder, each with its plain PyTorch twin.

Imported as ``copynce.kernels`` (a link in ``copynce/`` leads here), so that no other package called ``kernels`` is in
its way.
The twins import torch alone: they work where Triton cannot be imported.
"""
