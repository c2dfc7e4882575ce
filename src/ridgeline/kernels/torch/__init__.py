"""Kernels that torch already has: cuBLAS for matrix products, and references that run well as they are.

Knows which references are fit to serve on a GPU. It must not know Triton or CUDA code.
"""
