"""Makes the helpers of this folder importable from those below it: pytest puts a conftest's folder on the path."""
