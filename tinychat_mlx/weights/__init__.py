"""Weights: canonical forms, safetensors files, the layouts of checkpoints."""
