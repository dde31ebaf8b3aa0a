"""The engine: prefill, decode, sampling, the prefix cache."""
