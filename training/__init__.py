"""How the embedded model and its small speculative model were made.

This package collects a corpus, trains a tokenizer, trains the target model and distils the small one, measures
both, and writes the assets that ridgeline ships. It knows nothing of the engine, but for `coverage.py`, which borrows
its noise and its n-gram index: ridgeline reads the assets through the same files as any other checkpoint, and nothing
in `src/` imports from here.
"""
