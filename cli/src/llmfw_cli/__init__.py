"""The llmfw command line."""
