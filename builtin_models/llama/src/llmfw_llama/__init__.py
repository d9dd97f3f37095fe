"""LLaMA family."""
