"""A bar chart as SVG, written by hand: three series over the layers need no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 260, 64, 34, 40
FONT = 'font-family="sans-serif" font-size="11"'
COLOURS = ("#9aa5b1", "#e0a030", "#2878b5", "#5a9e4b")


def bars(series: Mapping[str, Sequence[float]], title: str, x_label: str, y_label: str) -> str:
    """Series (name -> a value for each x) as groups of bars from 0 up -> the text of an SVG file."""
    count = max(map(len, series.values()), default=0)
    top = max((v for values in series.values() for v in values), default=0.0) or 1.0
    plot_w, plot_h = WIDTH - LEFT - 12, HEIGHT - TOP - BOTTOM
    slot = plot_w / max(count, 1)
    width = slot * 0.8 / max(len(series), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for tick in range(5):
        y = TOP + plot_h * (1 - tick / 4)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tick / 4:.2g}</text>')
    for s, (name, values) in enumerate(series.items()):
        colour = COLOURS[s % len(COLOURS)]
        for i, value in enumerate(values):
            h = plot_h * value / top
            x = LEFT + slot * (i + 0.1) + width * s
            parts.append(
                f'<rect x="{x:.1f}" y="{TOP + plot_h - h:.1f}" width="{width:.1f}" height="{h:.1f}" fill="{colour}">'
                f"<title>{escape(name)}, {i}: {value:.3g}</title></rect>"
            )
        x = WIDTH - 12 - 70 * (len(series) - s)
        parts.append(f'<rect x="{x}" y="8" width="9" height="9" fill="{colour}"/>')
        parts.append(f'<text x="{x + 13}" y="16">{escape(name)}</text>')
    every = max(1, count // 24)
    for i in range(0, count, every):
        x = LEFT + slot * (i + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{i}</text>')
    parts.append(
        f'<text x="{LEFT + plot_w / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = TOP + plot_h / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_label)}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])
