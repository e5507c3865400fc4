"""Triton implementations, one file per op with the op's name, and nothing else that imports triton.

This package itself does not import triton: `aotrain.kernels` loads a module here when a CUDA tensor first needs it.
"""
