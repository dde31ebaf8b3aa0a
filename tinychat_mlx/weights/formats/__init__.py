"""On-disk layouts of quantised weights, one per module. `detect` selects the layout of a checkpoint.

Every layout converts the stored tensors of a module to a canonical `Packed` with the same codes.
"""
