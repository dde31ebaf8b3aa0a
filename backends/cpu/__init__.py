"""CPU backend: NumPy arrays and native kernels (kernels/), loaded with ctypes."""
