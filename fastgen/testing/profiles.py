"""Hypothesis profiles that share one budget of examples among tests.

``max_examples`` of a profile is the budget of the whole parity suite; every test takes its share of
it with :func:`share`. Choose one with ``HYPOTHESIS_PROFILE`` or ``--hypothesis-profile``:

* ``dev``: 100 examples, seconds.
* ``ci``: 2,400 examples, the same ones in every run. The default.
* ``long``: 50,000 new examples, about an hour on one core.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["BUDGETS", "choose", "share"]

BUDGETS = {"dev": 100, "ci": 2400, "long": 50_000}

_chosen = "ci"


def _register() -> None:
    for name, budget in BUDGETS.items():
        options: dict[str, Any] = {"derandomize": True, "database": None} if name == "ci" else {}
        settings.register_profile(
            name,
            max_examples=budget,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            **options,
        )


_register()


def choose(name: str | None = None) -> str:
    """Chooses the profile that :func:`share` uses; other tests keep theirs.

    Args:
        name: of the profile; ``HYPOTHESIS_PROFILE``, else ``ci``, when None.

    Returns:
        The name of the chosen profile.

    Raises:
        ValueError: there is no such profile.
    """
    global _chosen
    name = name or os.environ.get("HYPOTHESIS_PROFILE") or "ci"
    if name not in BUDGETS:
        raise ValueError(f"HYPOTHESIS_PROFILE is {name!r}; allowed are {', '.join(BUDGETS)}")
    _chosen = name
    return name


def share(part: float, least: int = 1, **kwargs: Any) -> settings:
    """Settings that take ``part`` (0 to 1) of the chosen profile's budget, at least ``least``."""
    count = max(least, round(part * BUDGETS[_chosen]))
    return settings(settings.get_profile(_chosen), max_examples=count, **kwargs)
