"""The live page: what an engine did lately, as plain data, and the document that draws it."""
