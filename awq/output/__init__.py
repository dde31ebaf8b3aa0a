"""The files of the result, and changes of format."""
