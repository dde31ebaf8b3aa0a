"""Apple silicon backend: MLX arrays, mx.fast operations, and Metal kernels that are measured to be faster."""
