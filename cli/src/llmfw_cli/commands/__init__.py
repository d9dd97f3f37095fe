"""The commands, one a file; what is heavy is imported inside the functions that need it."""
