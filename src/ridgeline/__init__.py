"""ridgeline: an LLM inference engine that runs at the limit of the hardware and knows what that limit is."""
