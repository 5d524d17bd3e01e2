"""One page: the answer first, then the table, the pictures, the search, and how to do it again.

A single file with its style and pictures inside. The page forbids itself to load anything (Content-Security-Policy),
follows light and dark, and turns the table's rows into cards on a phone.
"""

import html
from collections.abc import Iterable, Mapping, Sequence

from .arms import Outcome
from .statistics import Comparison
from .words import caption, cells, headings, pair_caption, pair_verdicts, verdicts

MAX_CARDS = 6  # comparisons that are all shown at length
STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5b6570; --page: #fbfbfa; --card: #fff; --line: #e3e5e8;
  --better: #17794f; --worse: #b3372f; --noise: #5b6570; --tint: 10%; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4af; --page: #14171b; --card: #1c2025;
  --line: #30363d; --better: #55c795; --worse: #f2867c; --noise: #9aa4af; --tint: 16%; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem }
p { margin: .4rem 0 } .soft { color: var(--soft); max-width: 48rem }
.verdicts { list-style: none; padding: 0; margin: 1.6rem 0 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.verdicts li, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: .7rem }
.verdicts li { padding: .9rem 1.1rem }
.badge { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; font-size: .82rem; font-weight: 600;
  color: var(--tone); background: color-mix(in srgb, var(--tone) var(--tint), transparent); white-space: nowrap }
.better { --tone: var(--better) } .worse { --tone: var(--worse) } .other { --tone: var(--noise) }
.verdicts .badge { margin-bottom: .35rem }
.table { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .55rem .6rem; text-align: right; white-space: nowrap }
th { color: var(--soft); font-weight: 500; font-size: .82rem } tbody tr { border-top: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
td:first-child { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  align-items: start }
figure { margin: 0; padding: .9rem .9rem .7rem } figure svg { display: block; width: 100%; height: auto }
.pictures figure:first-child { grid-column: 1 / -1 }
.pictures figure:first-child svg { max-width: 40rem; margin: 0 auto }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem }
.notes { padding-left: 1.2rem; max-width: 48rem } .notes li { margin: .3rem 0 }
details { margin-top: 1rem } summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; font-size: .85rem }
@media (max-width: 40rem) {
  main { padding: 1.5rem .9rem 3rem }
  .wide thead { display: none } .wide tr { display: block; padding: .6rem .9rem }
  .wide td { display: flex; justify-content: space-between; gap: 1rem; padding: .12rem 0; white-space: normal }
  .wide td::before { content: attr(data-label); color: var(--soft) } .wide td:empty { display: none }
  .wide td:first-child { font-size: 1.05rem } .wide td:first-child::before { content: none }
}
"""


def page(
    outcome: Outcome,
    pictures: Mapping[str, tuple[str, str]],
    *,
    command: str,
    machine: Sequence[str],
    missing: str = "",
) -> str:
    """The page's HTML.

    Args:
        pictures: from pictures.draw.
        command: what makes the comparison again.
        machine: what it ran on, a line each.
        missing: why there are no pictures, where there are none.
    """
    drawn = "".join(f"<figure>{svg}<figcaption>{_text(told)}.</figcaption></figure>" for told, svg in pictures.values())
    body = [
        f"<h1>{_text(outcome.title)}</h1>",
        f'<p class="soft">{_text(caption(outcome))}</p>',
        _pairs(outcome),
        _verdicts(outcome.comparisons.values(), verdicts(outcome)),
        _list(outcome.notes),
        "<h2>Every arm at its own best learning rate</h2>",
        _table(outcome),
        f'<h2>Pictures</h2><div class="pictures">{drawn}</div>' if drawn else f"<p>{_text(missing)}</p>",
        "<h2>How to do it again</h2>",
        f"<pre>{_text(command)}</pre>",
        _list(machine),
        f"<details><summary>The search: all {len(outcome.lines)} runs</summary>{_search(outcome)}</details>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(outcome.title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _text(words: object) -> str:
    return html.escape(str(words))


def _badge(verdict: str) -> str:
    tone = verdict if verdict in ("better", "worse") else "other"
    return f'<span class="badge {tone}">{_text(verdict)}</span>'


def _verdicts(found: Iterable[Comparison], sentences: Sequence[str]) -> str:
    """A card a comparison; of many, those without a difference are folded away."""
    shown, folded = list[str](), list[str]()
    for comparison, sentence in zip(found, sentences, strict=True):
        fold = len(sentences) > MAX_CARDS and comparison.verdict == "within noise"
        (folded if fold else shown).append(f"<li>{_badge(comparison.verdict)}<br>{_text(sentence)}</li>")
    summary = f"<summary>Within noise: {len(folded)} of {len(sentences)}</summary>"
    return _cards(shown) + (f"<details>{summary}{_cards(folded)}</details>" if folded else "")


def _cards(cards: Sequence[str]) -> str:
    return f'<ul class="verdicts">{"".join(cards)}</ul>' if cards else ""


def _pairs(outcome: Outcome) -> str:
    if not outcome.pairs:
        return ""
    cards = _verdicts(outcome.pairs.values(), pair_verdicts(outcome))
    beside = f"<h2>Beside {_text(outcome.baseline.name)}</h2>" if outcome.baseline else ""
    return f'<h2>Arm against arm</h2><p class="soft">{_text(pair_caption(outcome))}</p>{cards}{beside}'


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="notes soft">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>' if lines else ""


def _table(outcome: Outcome) -> str:
    names = headings(outcome)
    verdict = names.index("verdict")
    rows = []
    for arm in outcome.arms:
        row = [
            f'<td data-label="{_text(name)}">{_badge(cell) if number == verdict else _text(cell)}</td>'
            for number, (name, cell) in enumerate(zip(names, cells(outcome, arm), strict=True))
        ]
        rows.append("".join(row))
    return _framed(names, rows, kind="wide")


def _framed(names: Sequence[str], rows: Sequence[str], *, kind: str = "narrow") -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _search(outcome: Outcome) -> str:
    """Every run with its figures, or with why it has none."""
    rows = []
    for line in outcome.lines:
        figures = [line.get(part, {}).get(outcome.metric.name, {}).get("value") for part in ("validation", "test")]
        told = [f"{value:.{outcome.metric.decimals}f}" if value is not None else "" for value in figures]
        state = line["status"] + (f": {line['error']}" if line["error"] else "")
        row = [line["arm"], f"{line['recipe']['learning_rate']:g}", line["seed"], *told, state]
        rows.append("".join(f"<td>{_text(cell)}</td>" for cell in row))
    return _framed(("arm", "learning rate", "seed", "validation", "test", "state"), rows)
