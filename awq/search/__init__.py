"""The searches: scales, clips, codes, error feedback."""
