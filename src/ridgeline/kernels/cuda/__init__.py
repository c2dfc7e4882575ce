"""GPU kernels in CUDA C++, compiled on the user's machine by NVRTC; importing a module registers its kernels.

Knows CUDA. It must not know which kernel is chosen, nor anything above the ops. Importing compiles nothing
and needs neither a GPU nor NVRTC. Every kernel here reads lengths and offsets from device memory alone and
takes its grid from shapes, so that a step can be captured in a CUDA graph once each kernel has been loaded.
"""
