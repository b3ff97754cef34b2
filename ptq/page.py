"""Self-contained HTML pages: text, tables and SVG charts that need no other file and read well in light and dark.

Functions return HTML. Every text that comes from outside is escaped here; callers pass plain text and numbers.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from ptq.page_scale import Scale, linear_scale, log_scale

# Distinct also for people who confuse red and green; lighter on a dark page.
_LIGHT = ("#0b5fa5", "#c4500b", "#117a4b", "#8a3b95", "#8c6d00", "#b3204d", "#3d6b73", "#5b5b5b")
_DARK = ("#7cc0ff", "#ffab70", "#6fd9a6", "#dd9be8", "#e3c35c", "#ff8fab", "#96ccd6", "#bdbdbd")

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1b1b; --paper: #fff; --faint: #60656b; --line: #d5d8dc; --wash: #f4f6f8; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --faint: #a2a8af; --line: #3a3f45; --wash: #1f2327; DARK }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0; max-width: 46rem } .note { color: var(--faint); font-size: .875rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .875rem }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
dl.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0 0 }
dl.facts div { background: var(--wash); border-radius: 6px; padding: .5rem .9rem }
dl.facts dt { color: var(--faint); font-size: .8rem } dl.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600 }
details { margin: .6rem 0 } summary { cursor: pointer }
pre { background: var(--wash); border-radius: 6px; padding: .8rem; overflow-x: auto; font-size: .8rem; margin: .5rem 0 }
figure { margin: .4rem 0 } svg { display: block; width: 100%; height: auto; max-width: 50rem }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif } svg .grid { stroke: var(--line) }
svg text.label { fill: var(--ink) } svg polyline { fill: none; stroke-width: 1.7 }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; padding: 0;
  font-size: .875rem }
ul.legend svg { display: inline-block; width: 26px; height: 12px; margin-right: .4rem }
@media print { details > * { display: block } }
"""
_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 16, 12, 44
_DASHES = ("none", "7 4", "2 3")


class Series(NamedTuple):
    """Points of one colour; ``joined`` by a line in the order given. ``label`` stands beside the first point."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True
    label: str = ""


BEGINNING = (  # of every page, and so what one is known by
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">'
)


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A whole document."""
    colours = [" ".join(f"--c{i}: {c};" for i, c in enumerate(palette)) for palette in (_LIGHT, _DARK)]
    style = _STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1])
    return "\n".join(
        [
            BEGINNING,
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            paragraph(lead, note=True),
            *sections,
            "</body>\n</html>\n",
        ]
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, *, note: bool = False) -> str:
    """Running text."""
    start = '<p class="note">' if note else "<p>"
    return f"{start}{escape(text)}</p>"


def facts(values: Mapping[str, str]) -> str:
    """A few figures worth seeing first."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="facts">{items}</dl>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text; every column but the first is aligned to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        starts = [f"<{tag}>", *[f'<{tag} class="n">'] * (len(cells) - 1)]
        filled = [f"{start}{escape(cell)}</{tag}>" for start, cell in zip(starts, cells, strict=True)]
        return f"<tr>{''.join(filled)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    top = line("th", head)
    return f'<div class="wide"><table>\n<thead>{top}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def number(value: float | None, spec: str) -> str:
    """A figure as a cell has it; nothing for None."""
    return "" if value is None else format(value, spec)


def folded(summary: str, content: str) -> str:
    """Content that is shown on request."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def listing(text: str) -> str:
    """Text as it is, in a fixed width."""
    return f"<pre>{escape(text)}</pre>"


def chart(series: Sequence[Series], *, x: str, y: str, log: bool = False, whole: bool = False) -> str:
    """An SVG chart with its legend.

    Args:
        series: what to draw; points that are not finite are left out and counted below, those at or below 0 of a
            logarithmic axis are left out.
        x: name of the horizontal axis.
        y: name of the vertical one.
        log: whether the vertical axis is logarithmic.
        whole: whether the horizontal axis counts whole things, such as layers.
    """
    finite = [s._replace(points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    beyond = sum(len(s.points) for s in series) - sum(len(s.points) for s in finite)
    said = paragraph(f"Not drawn: {beyond} that are not finite.", note=True) if beyond else ""
    kept = [s._replace(points=[p for p in s.points if not log or p[1] > 0]) for s in finite]
    points = [p for s in kept for p in s.points]
    if not points:
        return paragraph(f"Nothing to draw: no {'positive' if log else 'finite'} values of {y}.", note=True)
    across = linear_scale([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, whole=whole)
    up = (log_scale if log else linear_scale)([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    marks = "\n".join(_series(s, index, across, up) for index, s in enumerate(kept))
    opening = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y)} by {escape(x)}">'
    svg = f"{opening}\n{_axes(across, up, x, y)}\n{marks}\n</svg>"
    legend = "" if all(s.label for s in series) or len(series) == 1 else _legend(series)
    return f"<figure>\n{svg}\n{legend}</figure>{said}"


def _axes(across: Scale, up: Scale, x: str, y: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value, text in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for value, text in across.ticks:
        at = across(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    turned = f"translate(14 {(bottom + _TOP) / 2}) rotate(-90)"
    parts.append(f'<text class="label" transform="{turned}" text-anchor="middle">{escape(y)}</text>')
    return "\n".join(parts)


def _series(series: Series, index: int, across: Scale, up: Scale) -> str:
    colour, dash = f"var(--c{index % len(_LIGHT)})", _DASHES[index // len(_LIGHT) % len(_DASHES)]
    places = [(across(px), up(py)) for px, py in series.points]
    parts = []
    if series.joined:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline style="stroke: {colour}" stroke-dasharray="{dash}" points="{path}"/>')
    radius = 3 if series.joined else 5
    for (px, py), (value_x, value_y) in zip(places, series.points, strict=True):
        said = escape(f"{series.name}: {value_x:g}, {value_y:.4g}")
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" style="fill: {colour}"><title>{said}</title></circle>'
        )
    if series.label and places:
        px, py = places[0]
        anchor, shift = ("end", -9) if px > 0.75 * _WIDTH else ("start", 9)
        parts.append(
            f'<text class="label" x="{px + shift:.1f}" y="{py + 4:.1f}" text-anchor="{anchor}">'
            f"{escape(series.label)}</text>"
        )
    return "\n".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = []
    for index, each in enumerate(series):
        colour, dash = f"var(--c{index % len(_LIGHT)})", _DASHES[index // len(_LIGHT) % len(_DASHES)]
        stroke = f'style="stroke: {colour}; stroke-width: 3" stroke-dasharray="{dash}"'
        line = f'<line x1="0" x2="26" y1="6" y2="6" {stroke}/>'
        items.append(f'<li><svg viewBox="0 0 26 12" aria-hidden="true">{line}</svg>{escape(each.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>\n'
