"""Attention measured: every rung of the ladder beside its peers, in time, memory and traffic."""
