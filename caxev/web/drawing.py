"""Draw bars, sparklines and matrices as SVG, each with a text of the same content. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

WIDTH: Final = 120
HEIGHT: Final = 28


def bar(done: float, total: float | None, label: str) -> Markup:
    """Return a bar that is full at `total`; None: how much there is to do is unknown."""
    share = 0.0 if not total else min(max(done / total, 0.0), 1.0)
    return Markup(
        '<svg class="bar" role="img" aria-label="{}" viewBox="0 0 100 6" '
        'preserveAspectRatio="none">'
        '<rect class="track" width="100" height="6"></rect>'
        '<rect class="fill" width="{:.1f}" height="6"></rect></svg>'
    ).format(label, 100 * share)


def sparkline(values: Sequence[float], label: str) -> Markup:
    """Return columns, one for each value, the latest at the right."""
    top = max(values, default=0.0) or 1.0
    step = WIDTH / max(len(values), 1)
    bar = max(step - 1, 0.5)
    path = "".join(
        f"M{index * step:.2f} {HEIGHT}v-{max(HEIGHT * value / top, 1.0):.2f}h{bar:.2f}V{HEIGHT}z"
        for index, value in enumerate(values)
        if value
    )
    return Markup(
        '<svg class="spark" role="img" aria-label="{}" viewBox="0 0 {} {}" '
        'preserveAspectRatio="none"><path d="{}"></path></svg>'
    ).format(label, WIDTH, HEIGHT, path)


def area(values: Sequence[float], label: str) -> Markup:
    """Return values over time as an area, the latest at the right; its top is the largest."""
    top = max(values, default=0.0) or 1.0
    step = WIDTH / max(len(values) - 1, 1)
    points = " ".join(
        f"{index * step:.1f},{HEIGHT - 1 - (HEIGHT - 2) * value / top:.1f}"
        for index, value in enumerate(values)
    )
    return Markup(
        '<svg class="area" role="img" aria-label="{}" viewBox="0 0 {} {}" '
        'preserveAspectRatio="none"><polygon points="0,{} {} {},{}"></polygon>'
        '<polyline points="{}"></polyline></svg>'
    ).format(label, WIDTH, HEIGHT, HEIGHT, points, WIDTH, HEIGHT, points)


def stack(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """Return one bar of several parts, each with the class of its colour."""
    total = sum(amount for _, amount in parts) or 1.0
    drawn, at = Markup(""), 0.0
    for name, amount in parts:
        width = 100 * amount / total
        drawn += Markup('<rect class="{}" x="{:.2f}" width="{:.2f}" height="8"></rect>').format(
            name, at, width
        )
        at += width
    return Markup(
        '<svg class="stack" role="img" aria-label="{}" viewBox="0 0 100 8" '
        'preserveAspectRatio="none">{}</svg>'
    ).format(label, drawn)
