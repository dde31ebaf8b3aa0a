"""One file per on-disk layout of quantised weights; `detect` says which one a checkpoint has.

Every layout turns the stored tensors of one module into a canonical `Packed`, with the same codes.
"""
