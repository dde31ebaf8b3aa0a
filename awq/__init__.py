"""AWQ: calibrate, search scales and clips, fold, feed errors back, and say what was lost."""
