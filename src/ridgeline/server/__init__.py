"""The HTTP face: an OpenAI-compatible server around an engine in a process of its own.

Knows HTTP, JSON, intake and delivery, and the engine by its messages alone: nothing here imports torch. It must not
know schedules or devices.
"""
