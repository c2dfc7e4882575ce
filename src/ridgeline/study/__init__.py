"""Whatever runs an engine in order to say something about it."""
