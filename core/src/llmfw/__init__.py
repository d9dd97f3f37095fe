"""llmfw: plugin-first LLM inference."""
