"""Speculation: who drafts token trees, how large they are made, and why what comes out is exact."""
