"""CPU kernels, compiled on the user's machine by numba on first use."""
