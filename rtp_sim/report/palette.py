"""The colours of every chart: one colour, one meaning, in all of them.

The hues are those of Okabe and Ito's palette for colour-blind readers (jfly.uni-koeln.de/color), chosen so
that neighbours in a stack differ in lightness too, as predicted (violet) and measured (ink) do. Each role
has a value for light and for dark backgrounds.
"""

from __future__ import annotations

from collections.abc import Iterable

from rtp_sim.schedule.ir import CATEGORIES

ROLES: dict[str, tuple[str, str]] = {
    "compute": ("#0072b2", "#4aa3df"),
    "communication": ("#d55e00", "#f0813a"),
    "bubble": ("#d4d8dd", "#454c55"),
    "weights": ("#009e73", "#2bbd93"),
    "gradients": ("#e69f00", "#f0b429"),
    "optimizer": ("#cc79a7", "#d98fb8"),
    "activations": ("#56b4e9", "#7cc8f2"),
    "workspace": ("#7a8390", "#98a2ae"),
    "predicted": ("#9575cd", "#b39ddb"),
    "measured": ("#1b1f24", "#e6e9ed"),
}
"""Role -> (colour on light, colour on dark). "communication" is time spent sending, and its buffers."""

_HUES = ("compute", "communication", "weights", "optimizer", "gradients", "activations", "predicted", "workspace")
LINES = tuple(f"line-{n}" for n in range(1, len(_HUES) + 1))
"""Roles of lines that are told apart and mean nothing by themselves, in charts that show no other roles."""
ROLES |= {line: ROLES[hue] for line, hue in zip(LINES, _HUES, strict=True)}


def in_stack_order(categories: Iterable[str]) -> list[str]:
    """Memory categories as every chart stacks them: in the schedule's order, unknown ones last."""
    known = {category: place for place, category in enumerate(CATEGORIES)}
    return sorted(categories, key=lambda category: known.get(category, len(known)))


def light(role: str) -> str:
    """The colour of a role on white; grey for a role this palette does not know."""
    return ROLES.get(role, ROLES["workspace"])[0]


def css_variables(dark: bool) -> str:
    """The palette as CSS custom properties (--compute: ...;)."""
    return " ".join(f"--{role}: {colours[1 if dark else 0]};" for role, colours in ROLES.items())
