"""The kernels' compiled parts, in numba and LLVM. Nothing here is imported once the machine code is on disk.

Knows addresses and numbers. Files bear the names of the ops whose kernels they hold, or of the parts that
these share.
"""
