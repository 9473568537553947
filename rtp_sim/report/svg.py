"""The SVG that the HTML report's static charts are made of: text, lines, colours, key and frame.

Colours are CSS variables, so that one drawing serves light and dark pages. Sizes are SVG units; a chart is
WIDTH wide and scales with the page. Everything that comes from outside is escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rtp_sim.report.palette import ROLES

WIDTH = 920


def colour(role: str) -> str:
    """The CSS colour of a role; grey for one the palette does not know."""
    return f"var(--{role if role in ROLES else 'workspace'})"


def ink(role: str) -> str:
    """The CSS class of text that is legible on a role's colour."""
    return "on-compute" if role in ("compute", "measured") else "on-light"


def text(css: str, x: float, y: float, content: str, anchor: str = "start") -> str:
    """A text at (x, y), its baseline; `anchor` is start, middle or end."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(css: str, x: float, y: float, width: float, height: float, role: str, tip: str) -> str:
    """A filled rectangle with a tooltip."""
    size = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
    return f'<rect class="{css}" {size} fill="{colour(role)}"><title>{escape(tip)}</title></rect>'


def area(css: str, path: str, role: str, tip: str) -> str:
    """A filled path with a tooltip."""
    return f'<path class="{css}" d="{path}" fill="{colour(role)}"><title>{escape(tip)}</title></path>'


def dot(css: str, x: float, y: float, radius: float, role: str, tip: str) -> str:
    """A filled circle with a tooltip."""
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
    return f'<circle class="{css}" {place} fill="{colour(role)}"><title>{escape(tip)}</title></circle>'


def key(roles: Sequence[str], names: Mapping[str, str]) -> str:
    """The colour key above a chart, as HTML; `names` gives what a role is called if not by its own name."""
    swatches = [f'<span class="swatch" style="background:{colour(role)}"></span>' for role in roles]
    labels = [escape(names.get(role, role)) for role in roles]
    items = [f"<li>{swatch}{label}</li>" for swatch, label in zip(swatches, labels, strict=True)]
    return f'<ul class="key">{"".join(items)}</ul>'


def frame(css: str, label: str, height: float, parts: Sequence[str]) -> str:
    """The chart around its parts, with its accessible name."""
    attributes = f'class="chart {css}" role="img" aria-label="{escape(label, quote=True)}"'
    return f'<svg {attributes} viewBox="0 0 {WIDTH} {height:.0f}">{"".join(parts)}</svg>'
