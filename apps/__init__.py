"""Command line, terminal chat, and the training code of the demo model."""
