"""Calibration: text to tokens, tokens to rows, rows to the inputs of each linear."""
