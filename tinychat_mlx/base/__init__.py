"""The base of all parts: errors, wording, paths, limits, caches on disk. Imports neither NumPy nor other parts."""
