"""The engine: choose, plan, run, commit, one step at a time."""
