"""AWQ quantisation: calibration, scale and clip search, folding, error feedback and quality reports."""
