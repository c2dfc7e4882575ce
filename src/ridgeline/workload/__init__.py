"""Requests that arrive over time, one driver for the wall's clock and a virtual one, and what users feel."""
