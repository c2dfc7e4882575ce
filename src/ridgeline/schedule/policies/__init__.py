"""The policies by name: every file here is one, called as the file is.

Knows only that each file has a `POLICY`. Must not know any of them by name.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ridgeline.core.errors import InvalidArgument
from ridgeline.schedule.policy import Policy


def _discovered() -> dict[str, type[Policy]]:
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}").POLICY for name in names}


POLICIES: dict[str, type[Policy]] = _discovered()


def make_policy(name: str) -> Policy:
    """A fresh policy of that name. Raises InvalidArgument listing the known ones."""
    if name not in POLICIES:
        raise InvalidArgument("policy", f"{name!r} is not known; known are {', '.join(POLICIES)}")
    return POLICIES[name]()
