"""Writing a plugin: from a name and a few answers, or from a checkpoint's config and headers."""
