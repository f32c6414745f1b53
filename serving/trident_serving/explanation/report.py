"""Explanations as a table, as JSON, and as a page."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from trident_serving.explanation.units import Attribution, Explanation

ROWS = 10  # of a table


def as_json(found: Sequence[Explanation]) -> str:
    """A list of objects."""
    return json.dumps([asdict(each) for each in found], indent=2, ensure_ascii=False) + "\n"


def as_table(found: Sequence[Explanation]) -> str:
    """A table for each statement: what it rests on most, and what speaks most against it."""
    return "\n".join(_table(each) for each in found)


def _table(found: Explanation) -> str:
    ranked = sorted(found.attributions, key=lambda each: -abs(each.value))
    several = len(found.texts) > 1
    width = max((len(_shown(each.text)) for each in ranked[:ROWS]), default=0)
    lines = [
        f"{found.model}: {_shown(found.of)} ({found.measure} {found.score:.4g})",
        f"  {' | '.join(map(_shown, found.texts.values()))}",
        "",
    ]
    lines += [
        f"  {each.value:+10.4g}  {_shown(each.text):{width}}{f'  {each.part}' if several else ''}".rstrip()
        for each in ranked[:ROWS]
    ]
    if len(ranked) > ROWS:
        lines.append(f"  ... and {len(ranked) - ROWS} more; --json and --html show all")
    return "\n".join(lines) + "\n"


def _shown(text: str, most: int = 60) -> str:
    """A text on a line, without characters that a terminal would obey."""
    plain = "".join(
        character if character == " " or unicodedata.category(character)[0] not in "CZ" else " " for character in text
    )
    return plain if len(plain) <= most else plain[: most - 1] + "…"


_STYLE = """
body { font: 16px/1.7 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2024; background: #fff; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .3rem; overflow-wrap: anywhere; }
.note { color: #5a6470; margin: 0 0 .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #d5dae0; border-radius: 6px;
        padding: .7rem 1rem; margin: .4rem 0; }
mark { color: inherit; border-radius: 3px; padding: .1em 0; }
mark.for { background: rgb(0 114 178 / var(--share)); }
mark.against { background: rgb(230 130 0 / var(--share)); border-bottom: 2px dotted #b26500; }
table { border-collapse: collapse; margin-top: .6rem; }
td, th { padding: .1rem 1rem .1rem 0; text-align: left; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def as_html(found: Sequence[Explanation]) -> str:
    """A page that stands for itself: no script, no other file; what the texts hold is text."""
    title = html.escape(f"What answers of {found[0].model if found else 'the model'} rest on")
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
            '<p class="note">Blue: without it the score is lower. Orange, dotted: higher.</p>\n',
            *(line for each in found for line in _section(each)),
            "</body>\n</html>\n",
        )
    )


def _section(found: Explanation) -> Iterator[str]:
    most = max((abs(each.value) for each in found.attributions), default=0.0)
    yield f"<h2>{html.escape(found.of)}</h2>\n"
    yield (
        f'<p class="note">{html.escape(found.model)}, {html.escape(found.task)}: {html.escape(found.measure)} '
        f"{found.score:.4g}; each {html.escape(found.by)} {html.escape(found.hidden)}; the darkest is {most:.4g}</p>\n"
    )
    for part, text in found.texts.items():
        if len(found.texts) > 1:
            yield f'<p class="note">{html.escape(part)}</p>\n'
        marked = _marked(text, [each for each in found.attributions if each.part == part], most)
        yield f'<div class="text" dir="auto">{marked}</div>\n'
    yield "<details><summary>Numbers</summary>\n<table>\n"
    for each in sorted(found.attributions, key=lambda each: -abs(each.value)):
        yield f'<tr><td class="number">{each.value:+.4g}</td><td>{html.escape(each.text)}</td></tr>\n'
    yield "</table></details>\n"


def _marked(text: str, found: Sequence[Attribution], most: float) -> str:
    parts, end = [], 0
    for each in found:  # in the text's order; tokens may share a character
        start = max(each.start, end)
        if start >= each.end:
            continue
        share = abs(each.value) / most if most else 0.0
        kind = "for" if each.value >= 0 else "against"
        parts += [
            html.escape(text[end:start]),
            f'<mark class="{kind}" style="--share: {0.85 * share:.3f}" title="{each.value:+.4g}">',
            html.escape(text[start : each.end]),
            "</mark>",
        ]
        end = each.end
    return "".join([*parts, html.escape(text[end:])])
