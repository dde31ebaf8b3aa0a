"""Draw three kinds of bar charts as SVG, without a plotting library.

Each function returns the text of a file. Every bar starts at 0 and shows its value as a tooltip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

WIDTH, EDGE = 760, 24
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12"'
# distinguishable in grey and with colour blindness
COLOURS = {"rtn": "#b8c0cc", "awq": "#f2b134", "awq+": "#2f7ed8"}
MORE = ("#2f7ed8", "#f2b134", "#7bc8a4", "#b8c0cc")
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e9edf2"

Bars = Mapping[str, tuple[float, float]]  # name -> (value, standard error)


def layers(series: Mapping[str, Sequence[float]], title: str, x_label: str, y_label: str) -> str:
    """Draw several series (name -> one value per layer) as grouped bars."""
    height, left, top, bottom = 276, 64, 66, 46
    count = max(map(len, series.values()), default=0)
    most = max((v for values in series.values() for v in values), default=0.0) or 1.0
    inner_w, inner_h = WIDTH - left - EDGE, height - top - bottom
    out = [*_frame(height, title), *_legend(series, WIDTH - EDGE)]
    ticks = _ticks(most)
    for tick in ticks:
        y = top + inner_h * (1 - tick / ticks[-1])
        out.append(_line(left, y, WIDTH - EDGE, y, GRID))
        out.append(_text(left - 8, y + 4, _short(tick), "end", FAINT))
    slot = inner_w / max(count, 1)
    width = min(slot * 0.8 / max(len(series), 1), 26)
    for s, (name, values) in enumerate(series.items()):
        for i, value in enumerate(values):
            x = left + slot * (i + 0.5) + width * (s - len(series) / 2)
            h = inner_h * value / ticks[-1]
            out.append(
                _bar(
                    x,
                    top + inner_h - h,
                    width * 0.94,
                    h,
                    _colour(name, s),
                    f"{name}, {x_label} {i}: {value:.3g}",
                )
            )
    for i in range(0, count, max(1, ceil(count / 24))):
        out.append(_text(left + slot * (i + 0.5), height - bottom + 17, str(i), "middle", FAINT))
    out.append(_line(left, top + inner_h, WIDTH - EDGE, top + inner_h, FAINT))
    out.append(_text(left + inner_w / 2, height - 12, x_label, "middle", FAINT))
    out.append(_text(EDGE, top - 17, y_label, "start", FAINT))
    return _closed(out)


def panels(found: Mapping[str, Bars], title: str) -> str:
    """Draw small charts next to each other (label -> bars), each with its own scale.

    Whiskers: standard errors.
    """
    height, top, bottom = 284, 92, 40
    inner_h, slot = height - top - bottom, (WIDTH - 2 * EDGE) / max(len(found), 1)
    out = _frame(height, title)
    for p, (label, bars) in enumerate(found.items()):
        left = EDGE + slot * p
        most = max((v + e for v, e in bars.values()), default=0.0) or 1.0
        width = min(54.0, slot * 0.7 / max(len(bars), 1))
        out.append(_text(left + slot / 2, top - 32, label, "middle", FAINT))
        for b, (name, (value, error)) in enumerate(bars.items()):
            x = left + slot / 2 + width * 1.15 * (b - len(bars) / 2)
            h, e = inner_h * value / most, inner_h * error / most
            y, middle = top + inner_h - h, x + width / 2
            out.append(_bar(x, y, width, h, _colour(name, b), f"{name}: {value:.4g} ± {error:.2g}"))
            if e:
                out += [
                    _line(middle, y - e, middle, y + e, INK),
                    _line(middle - 5, y - e, middle + 5, y - e, INK),
                ]
                out.append(
                    _line(middle - 5, min(y + e, top + inner_h), middle + 5, min(y + e, top + inner_h), INK)
                )
            out.append(_text(middle, y - e - 6, _short(value), "middle", INK))
            out.append(_text(middle, height - bottom + 17, name, "middle", FAINT))
        out.append(_line(left + 16, top + inner_h, left + slot - 16, top + inner_h, FAINT))
    return _closed(out)


def stacks(found: Mapping[str, Mapping[str, float]], title: str, unit: str) -> str:
    """Draw stacked horizontal bars (label -> parts) on a common scale."""
    row, top, left = 34, 58, 96
    height = top + row * len(found) + 14
    most = max((sum(parts.values()) for parts in found.values()), default=0.0) or 1.0
    names = {name: 0.0 for parts in found.values() for name in parts}
    out = [*_frame(height, title), *_legend(names, WIDTH - EDGE)]
    scale = (WIDTH - left - EDGE - 90) / most
    for r, (label, parts) in enumerate(found.items()):
        x, y = float(left), top + row * r
        out.append(_text(left - 10, y + 16, label, "end", INK))
        for name, value in parts.items():
            colour = MORE[list(names).index(name) % len(MORE)]
            out.append(_bar(x, y, value * scale, row - 12, colour, f"{label}, {name}: {value:.4g} {unit}"))
            x += value * scale
        out.append(_text(x + 8, y + 16, f"{sum(parts.values()):.4g} {unit}", "start", INK))
    return _closed(out)


def _colour(name: str, at: int) -> str:
    return COLOURS.get(name, MORE[at % len(MORE)])


def _frame(height: int, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" {FONT}>',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#ffffff" stroke="{GRID}"/>',
        f'<text x="{EDGE}" y="30" font-size="15" font-weight="600" fill="{INK}">{escape(title)}</text>',
    ]  # fmt: skip


def _legend(names: Mapping[str, object], right: float) -> list[str]:
    out, x = [], right
    for s, name in reversed(list(enumerate(names))):
        x -= 7.2 * len(name) + 30
        out.append(f'<rect x="{x:.1f}" y="20" width="11" height="11" rx="2.5" fill="{_colour(name, s)}"/>')
        out.append(_text(x + 16, 30, name, "start", INK))
    return out


def _bar(x: float, y: float, width: float, height: float, colour: str, says: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}" rx="1.5" fill="{colour}">'
        f"<title>{escape(says)}</title></rect>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _ticks(most: float) -> list[float]:
    """Return ticks from 0 to the first round number ≥ `most`, in steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** floor(log10(most / 4))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= most / 4)
    return [step * i for i in range(ceil(most / step - 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _closed(parts: list[str]) -> str:
    return "\n".join([*parts, "</svg>", ""])
