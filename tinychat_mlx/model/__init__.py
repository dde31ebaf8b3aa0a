"""The model: its configuration, the table of families, the decoder graph."""
