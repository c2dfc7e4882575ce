"""How ops are computed. A file bears the name of the op that it serves.

Importing this package loads no kernels: select.py loads the folders that a device can use.
"""
