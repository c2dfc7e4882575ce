"""Plain data that every other part speaks: requests, steps, costs, clocks, configuration, errors.

Knows only the standard library. Must not know tensors, strings of a tokenizer, or any other folder.
"""
