"""The pieces of a page: no script, no font and no image from anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1f24",
    "quiet": "#565d66",
    "line": "#d9dde3",
    "accent": "#0a58a8",
}
DARK = {
    "paper": "#14171b",
    "panel": "#1c2026",
    "ink": "#e7e9ec",
    "quiet": "#a4abb5",
    "line": "#343a43",
    "accent": "#7fb8f5",
}
READABLE = [(text, ground) for text in ("ink", "quiet", "accent") for ground in ("paper", "panel")]
"""The pairs of colours in which there is text."""

STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
main,header,footer{max-width:60rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3.5rem}
p,li{max-width:42rem}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.2;font-weight:650;letter-spacing:-.02em;margin:.2rem 0 .5rem;
overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;font-weight:650;letter-spacing:-.01em;margin:3.25rem 0 .5rem}
h3{font-size:1rem;font-weight:650;margin:1.75rem 0 .25rem}
.kicker{color:var(--accent);font-weight:650;margin:0}
.quiet,figcaption,caption{color:var(--quiet)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:8px;overflow:hidden;margin:2rem 0 0}
.figures div{background:var(--paper);padding:.9rem 1rem;display:flex;
flex-direction:column-reverse;justify-content:flex-end}
.figures dt{color:var(--quiet);font-size:.85rem;line-height:1.35}
.figures dd{margin:0;font-size:1.45rem;line-height:1.3;font-weight:600;letter-spacing:-.01em}
.facts{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.3rem 1.5rem;margin:.75rem 0}
.facts dt{color:var(--quiet)}
.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.75rem 0;-webkit-overflow-scrolling:touch}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
caption{text-align:left;padding-bottom:.4rem}
th,td{text-align:left;padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--quiet);font-weight:500;border-bottom-color:var(--quiet);white-space:nowrap}
tbody th{font-weight:500}
.n{text-align:right;white-space:nowrap;padding-right:0;padding-left:1.25rem}
.bar{display:block;height:3px;margin:.1rem 0 0 auto;background:var(--accent);border-radius:2px}
details{border-bottom:1px solid var(--line);padding:.55rem 0}
summary{cursor:pointer}
summary .quiet{margin-left:.4rem}
.reason{margin:.6rem 0 0}
.places{margin:.15rem 0 .4rem;padding-left:1.1rem;color:var(--quiet);font-size:.92rem;overflow-wrap:anywhere}
figure{margin:1rem 0}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12px system-ui,sans-serif;fill:var(--quiet)}
svg .name{fill:var(--ink)}
svg .axis{stroke:var(--line);stroke-width:1}
svg .roof{stroke:var(--ink);stroke-width:1.5;fill:none}
svg .op{fill:var(--accent);fill-opacity:.75;stroke:var(--paper);stroke-width:1}
svg .other{fill-opacity:0;stroke:var(--accent);stroke-width:1.5}
a{color:var(--accent)}
footer{padding-top:3rem;padding-bottom:3rem;font-size:.9rem}
@media (max-width:34rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}header{padding-top:2rem}
svg{min-width:34rem}
h2{margin-top:2.5rem}}
@media print{body{font-size:10.5pt}main,header,footer{max-width:none;padding:0}h2{break-after:avoid}
figure,.figures,tr{break-inside:avoid}.scroll{overflow:visible}details::details-content{content-visibility:visible;
block-size:auto;opacity:1}}
"""


def _colours(scheme: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{value};" for name, value in scheme.items()) + "}"


def page(title: str, kicker: str, lead: str, body: Iterable[str]) -> str:
    """A whole document. `title`, `kicker` and `lead` are text, `body` is HTML."""
    style = f"{_colours(LIGHT)}@media (prefers-color-scheme:dark){{{_colours(DARK)}}}"
    print_style = f"@media print{{{_colours(LIGHT)}}}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: {escape(kicker)}</title>\n"
        f"<style>{style}{print_style}{STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="quiet">{escape(lead)}</p>\n</header>\n<main>\n' + "\n".join(body) + "\n</main>\n"
        '<footer class="quiet"><p>Slack is measured time over the floor. The floor is the larger of FLOPs / peak and '
        "bytes / bandwidth, with weights and caches read once. Below 1, a cache served what should have come from "
        "memory.</p></footer>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def figure(drawing: str, caption: str) -> str:
    box = '<div class="scroll" role="region" tabindex="0" aria-label="drawing">'
    return f"<figure>{box}{drawing}</div><figcaption>{escape(caption)}</figcaption></figure>"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """The few numbers that matter most, each with what it is."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="figures">{cells}</dl>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], bars: Sequence[float] = ()) -> str:
    """A table that scrolls in its box. The first column is text, the others are numbers.

    `bars` are shares of 1, drawn under the last column.
    """
    head = "".join(f'<th scope="col"{_numeric(i)}>{escape(name)}</th>' for i, name in enumerate(headings))
    lines = []
    for number, row in enumerate(rows):
        first, *others = row
        cells = [f'<td class="n">{escape(value)}' for value in others]
        if bars:
            cells[-1] += f'<span class="bar" style="width:{100 * bars[number]:.1f}%"></span>'
        lines.append(f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"{cell}</td>" for cell in cells) + "</tr>")
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
    body = "\n".join(lines)
    title = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f"{box}<table>{title}\n<tbody>{body}</tbody></table></div>"


def _numeric(column: int) -> str:
    return ' class="n"' if column else ""


def fold(summary: str, remark: str, content: str) -> str:
    """What opens when it is asked for."""
    remark = f'<span class="quiet">{escape(remark)}</span>' if remark else ""
    return f"<details><summary>{escape(summary)} {remark}</summary>{content}</details>"


def places(reason: str, wheres: Iterable[str]) -> str:
    """Module paths under what is said about them."""
    items = "".join(f"<li>{escape(where)}</li>" for where in wheres)
    return f'<p class="reason">{escape(reason)}</p><ul class="places">{items}</ul>'
