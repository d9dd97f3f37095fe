"""Summaries by our engine and by transformers, scored, timed and compared."""
