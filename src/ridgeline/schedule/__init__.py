"""Who runs in a step, with how many tokens, and what came of it.

Knows requests, token ids and block numbers. Must not know tensors, text, time or prices: what a policy needs
of those will come as an argument.
"""

from ridgeline.schedule.event import Event
from ridgeline.schedule.policies import POLICIES, make_policy
from ridgeline.schedule.policy import Policy
from ridgeline.schedule.scheduler import Scheduler

__all__ = ["POLICIES", "Event", "Policy", "Scheduler", "make_policy"]
