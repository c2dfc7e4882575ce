"""Strings: tokenizers, chat templates, streaming text and stop strings.

Everything below `server` and `llm` works on ids; this folder is where ids and text meet. It must
not know requests, the engine or torch.
"""
