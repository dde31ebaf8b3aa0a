"""CUDA backend: NVIDIA GPUs (PC cards and Jetsons) through torch. Only this package imports torch."""
