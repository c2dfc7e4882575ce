"""Portable GPU kernels in Triton; importing a module registers its kernels on their ops.

Knows Triton. It must not know which kernel is chosen, nor anything above the ops. Every kernel here
reads lengths and offsets from device memory alone and takes its grid from shapes, so that a step can be
captured in a CUDA graph once each kernel has run (and compiled) outside of one.
"""
