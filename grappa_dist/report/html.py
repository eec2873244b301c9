"""HTML of the page: text that is escaped, numbers, tables, and the style sheet.

Labels, keys and task names come from the data and are never trusted. Colours are CSS variables for light and dark; the
palette is safe for colour-blind readers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from grappa_dist.console import format_number
from grappa_dist.output import HARMFUL

MISSING = "–"
POLICY = (  # of a page: no scripts, nothing is fetched
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def text(value: object, most: int = 300) -> str:
    """`value` escaped for element text and quoted attributes, cut to `most` characters."""
    plain = str(value)
    plain = plain if len(plain) <= most else plain[: most - 1] + "…"
    return html.escape(HARMFUL.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True)


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as percent without the sign, or a dash where there is none."""
    return decimal(100 * fraction, digits)


def points(difference: float) -> str:
    """A signed difference of fractions in percentage points, with a typographic minus."""
    if not math.isfinite(difference):
        return MISSING
    rounded = round(100 * difference, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded):.1f}"


def number(value: float) -> str:
    """A number for a reader: thousands apart, four significant digits below that."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else format_number(value, 4)


def decimal(value: float, digits: int) -> str:
    """A number with a fixed count of decimals, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else MISSING


def table(head: Iterable[str], body: Iterable[Iterable[str]], *, numeric: bool = True) -> str:
    """A table of ready markup; the first column names the row, the others hold numbers unless `numeric` is false."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = []
    for cells in body:
        first, *rest = cells
        rows.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    kind = "plain numeric" if numeric else "plain"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def page_head(title: str, *, style: str, policy: str = POLICY) -> str:
    """The beginning of a page that needs no other file, up to its body.

    Args:
        title: escaped.
        policy: what the page may fetch and run; by default nothing.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{style}</style></head><body>"
    )


def sentences(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of sentences, each after its subject; neither is trusted."""
    items = "".join(f"<li><b>{text(about, 60)}</b> {text(what, 1500)}</li>" for about, what in pairs)
    return f'<ul class="reading">{items}</ul>' if items else ""


def absent(why: str) -> str:
    """The reason why there is nothing to show."""
    return f'<p class="absent">{text(why)}</p>'


MARK = (
    '<svg class="mark" viewBox="0 0 40 40" aria-hidden="true">'
    '<path d="M2 2h36v7H2zM2 12h17v7H2zM21 12h17v7H21zM2 22h8v7H2zM11.5 22h8v7h-8zM21 22h8v7h-8zM30 22h8v7h-8z"/>'
    + '<path d="'
    + "".join(f"M{2 + 4.58 * i:.2f} 32h3.6v6h-3.6z" for i in range(8))
    + '"/></svg>'
)

_LIGHT = """
--bg:#f5f6f8;--card:#fff;--ink:#17202b;--muted:#5a6675;--rule:#e1e6ec;--wash:#eef2f6;--accent:#0a5ca8;
--up:#0a5ca8;--down:#b84a00;--more:#1467b8;--less:#d9690a;--on:#fff;--best:#eaf2fb;--warn:#fff6e6;
--warn-rule:#e2a93b;--edge:#17202b38;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b8860b;--c5:#3fa9e0;--c6:#6a4c93;--c7:#596673;
--right:#0a7d5a;--wrong:#b84a00;color-scheme:light dark;
"""
_DARK = """
--bg:#0e1319;--card:#161d26;--ink:#e7ecf2;--muted:#9aa7b5;--rule:#28323e;--wash:#1d2630;--accent:#7db8f0;
--up:#7db8f0;--down:#f2a05c;--more:#62aef5;--less:#f0954a;--on:#0c1218;--best:#1a2b3e;--warn:#2b2314;
--warn-rule:#a87a24;--edge:#000c;
--c0:#58aee8;--c1:#f08a4b;--c2:#3fc79a;--c3:#e59cc4;--c4:#dcb543;--c5:#93d3f7;--c6:#b39ddb;--c7:#9fb0bf;
--right:#3fc79a;--wrong:#f2a05c;
"""

_LAYOUT = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,nav{max-width:1140px;margin:0 auto;padding:0 20px}
header{display:flex;gap:16px;align-items:center;padding-top:30px;padding-bottom:14px}
header p{margin:2px 0 0;color:var(--muted)}
.mark{width:46px;flex:none;fill:var(--accent)}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 10px;letter-spacing:-.01em}
h3{font-size:15px;margin:26px 0 8px}
nav{position:sticky;top:0;z-index:3;display:flex;gap:4px 18px;overflow-x:auto;background:var(--bg);
border-bottom:1px solid var(--rule);padding-top:9px;padding-bottom:9px;scrollbar-width:none}
nav a{color:var(--muted);text-decoration:none;white-space:nowrap;font-size:14px}
nav a:hover,nav a:focus-visible{color:var(--accent)}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin:18px 0;
scroll-margin-top:48px}
.verdict{margin:0 0 16px;max-width:86ch;font-size:16.5px;overflow-wrap:anywhere}
.lead{margin:0 0 14px;max-width:78ch;color:var(--muted)}
.note{font-size:13px;color:var(--muted);margin:8px 0 0;max-width:90ch}
.absent{color:var(--muted);margin:4px 0}
.notes{list-style:none;margin:18px 0 0;padding:11px 18px;background:var(--warn);border:1px solid var(--warn-rule);
border-radius:12px}
.reading{margin:0;padding:0;list-style:none;max-width:92ch}
.reading li{padding:6px 0;border-top:1px solid var(--rule);overflow-wrap:anywhere}
.reading li:first-child{border-top:0}
.reading b{margin-right:.45em}
.fold{margin-top:16px;border-top:1px solid var(--rule);padding-top:12px}
.fold summary{cursor:pointer;font-weight:600;color:var(--accent)}
.fold[open] summary{margin-bottom:12px}
.fold small,.lane small{font-weight:400;color:var(--muted);margin-left:.5em}
pre{overflow-x:auto;background:var(--wash);border-radius:8px;padding:14px;
font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;margin:0}
.facts{display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:0 22px;margin:0}
.facts dt,.facts dd{margin:0;padding:6px 0;border-top:1px solid var(--rule);overflow-wrap:anywhere;min-width:0}
.facts dt{color:var(--muted)}
.facts dt:first-of-type,.facts dd:first-of-type{border-top:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:4px 0 20px}
.tiles div{background:var(--wash);border-radius:10px;padding:13px 16px;display:flex;flex-direction:column}
.tiles b{font-size:29px;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tiles span{font-size:13px;color:var(--muted);overflow-wrap:anywhere}
"""

_TABLES = """
.scroll{overflow-x:auto;margin:0 -4px;padding:0 4px;background:linear-gradient(90deg,var(--card) 40%,transparent) 0 0,
linear-gradient(270deg,var(--card) 40%,transparent) 100% 0,linear-gradient(90deg,var(--edge),transparent) 0 0,
linear-gradient(270deg,var(--edge),transparent) 100% 0;background-size:44px 100%,44px 100%,14px 100%,14px 100%;
background-repeat:no-repeat;background-attachment:local,local,scroll,scroll}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;width:100%}
th{font-weight:600;text-align:left}
thead th{font-size:13px;color:var(--muted);border-bottom:1px solid var(--rule);padding:6px 10px;vertical-align:bottom}
thead small{display:block;font-weight:400;font-size:11.5px;white-space:nowrap}
tbody th{position:sticky;left:0;background:var(--card);white-space:nowrap;z-index:1}
.score th,.score td{padding:7px 12px 8px;text-align:right}
.score th:first-child{text-align:left;padding-left:0}
.score tbody th{vertical-align:top}
.score td{min-width:104px;white-space:nowrap}
.score td:last-child,.score th:last-child{padding-right:8px}
.score .opens>*{border-top:1px solid var(--rule)}
.score .best{background:var(--best)}
.score .rp{font-size:16px;font-weight:550}
.score .best .rp{font-weight:700}
.star{color:var(--accent);font-size:11px;margin-right:4px;vertical-align:2px}
.map{color:var(--muted);font-size:12px;margin-left:6px}
.delta{display:inline-block;min-width:3.1em;font-size:12px;margin-left:8px;color:var(--muted)}
.delta.up{color:var(--up)}
.delta.down{color:var(--down)}
.delta:empty{visibility:hidden}
.range{display:block;color:var(--muted);font-size:11.5px;line-height:1.35}
.bar{display:block;position:relative;height:4px;margin-top:4px}
.bar i{position:absolute;top:0;height:4px;border-radius:2px;background:var(--up)}
.bar i.down{background:var(--down)}
.bar u{position:absolute;top:-2px;width:1px;height:8px;background:var(--muted);opacity:.7}
.none{color:var(--muted)}
.slim td,.slim th{padding-top:4px;padding-bottom:4px}
.plain{font-size:14px}
.plain td,.plain tbody th{padding:6px 10px;border-bottom:1px solid var(--rule);vertical-align:top}
.plain td{overflow-wrap:anywhere}
.plain tr>:first-child{padding-left:0}
.numeric tr>:not(:first-child){text-align:right}
.numeric td{white-space:nowrap}
.plain:not(.numeric) tbody th{white-space:normal;overflow-wrap:anywhere;font-weight:400}
.meter{display:block;height:4px;border-radius:2px;background:var(--wash);margin:4px 0 2px auto;max-width:180px}
.meter i{display:block;height:4px;border-radius:2px;background:var(--up)}
"""

_CHARTS = """
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:20px 26px}
.charts.few{grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.charts+.scroll{margin-top:22px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:16px 26px;margin-top:12px}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:14px;margin-bottom:5px;overflow-wrap:anywhere}
.chart,.heat{width:100%;height:auto;display:block}
.chart{max-width:450px}
.few .chart text{font-size:10.5px}
.chart text,.heat text{font-size:11.5px;fill:var(--muted);font-variant-numeric:tabular-nums}
.heat text{font-size:11px}
.heat .in{fill:var(--ink);font-size:10.5px;pointer-events:none}
.heat .strong{fill:var(--on)}
.grid{stroke:var(--rule);fill:none}
.axis{stroke:var(--muted);fill:none}
.line,.key path{stroke:var(--s);fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart circle{fill:var(--s);stroke:var(--card);stroke-width:1}
.column{fill:var(--c0)}
.cell{fill:var(--wash)}
.more{fill:var(--more)}
.less{fill:var(--less)}
.ink-more{color:var(--up)}
.ink-less{color:var(--down)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:5px 0 0;font-size:13px;color:var(--muted)}
.legend span{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.key{width:22px;height:8px;flex:none}
"""

_GALLERY = """
.store{position:absolute}
.cards{display:grid;gap:16px}
.card{display:flex;gap:20px;padding:14px;border:1px solid var(--rule);border-radius:10px}
.query{flex:0 0 132px;display:flex;flex-direction:column;gap:5px;font-size:13px;overflow-wrap:anywhere}
.query span{color:var(--muted)}
.tile{display:block;width:100%;aspect-ratio:1;border-radius:6px;background:var(--wash)}
.blank{display:grid;place-items:center;font-size:11px;color:var(--muted);text-align:center}
.lanes{flex:1;min-width:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));
gap:12px 24px}
.lane p{margin:0 0 5px;font-size:13px;font-weight:600}
.hits{display:grid;grid-template-columns:repeat(5,1fr);gap:7px}
.hit{position:relative;font-size:11.5px;color:var(--muted);text-align:center;font-variant-numeric:tabular-nums}
.hit small,.query small{margin:0;font-size:11px;line-height:1.3;color:var(--muted);overflow-wrap:anywhere}
.hit small{display:-webkit-box;-webkit-line-clamp:3;-webkit-box-orient:vertical;overflow:hidden}
.hit .tile{box-shadow:0 0 0 1px var(--rule)}
.hit.right .tile{box-shadow:0 0 0 2px var(--right)}
.hit.wrong .tile{box-shadow:0 0 0 2px var(--wrong);opacity:.82}
.hit i{position:absolute;top:-5px;right:-5px;width:17px;height:17px;border-radius:50%;
font:700 11px/17px system-ui,sans-serif;color:var(--on);background:var(--right)}
.hit.wrong i{background:var(--wrong)}
.strips{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px 26px}
.strip p{margin:0 0 5px;font-size:13px;font-weight:600}
.strip small{font-weight:400;color:var(--muted);margin-left:.5em}
.shots{display:grid;grid-template-columns:repeat(6,1fr);gap:7px}
.shots .tile{box-shadow:0 0 0 1px var(--rule)}
"""

_SMALL = """
@media(max-width:640px){
body{font-size:14.5px}
header,main,nav{padding-left:14px;padding-right:14px}
header{padding-top:20px}
h1{font-size:21px}
section{padding:16px 14px;border-radius:10px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}
.tiles div{padding:10px 12px}
.tiles b{font-size:23px}
.card{flex-direction:column;gap:12px}
.query{flex-basis:auto;width:120px}
.facts{grid-template-columns:1fr}
.facts dd{border-top:0;padding-top:0}
.score td{min-width:54px}
.score th,.score td,.score td:last-child,.score th:last-child{padding-left:4px;padding-right:4px}
.score thead th{font-size:12px;padding-left:7px}
.score thead th:first-child{padding-left:0}
nav{position:static;flex-wrap:wrap}
.score tbody th{min-width:78px;white-space:normal;overflow-wrap:break-word;font-size:13px}
.score .map,.score .delta{display:block;min-width:0;margin:0}
.score .delta:empty{display:none}
.score .range{font-size:10.5px}
thead small{white-space:normal}
.few .chart text,.chart text{font-size:13px}
}
@media print{
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
:root{color-scheme:light}
body{background:none;font-size:13px}
header,main{max-width:none;padding-left:0;padding-right:0}
nav{display:none}
section{break-inside:auto;border:0;padding:8px 0;margin:0}
h2,h3,summary{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}
.scroll{overflow:visible;background:none;margin:0;padding:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.score th,.score td{padding-left:4px;padding-right:4px}
.score td{min-width:0}
.score .map,.score .delta{display:block;min-width:0;margin:0}
.score{table-layout:fixed}
.score th{white-space:normal;overflow-wrap:anywhere}
.plain{font-size:11.5px}
.plain thead th{font-size:11px}
.plain td,.plain tbody th,.plain thead th{padding:4px 5px}
.numeric td,.plain tbody th,thead small{white-space:normal}
.plain th{overflow-wrap:anywhere}
figure,.card,.strip,tr{break-inside:avoid}
.lanes{grid-template-columns:1fr 1fr;gap:8px 14px}
.charts,.charts.few,.maps,.strips{grid-template-columns:1fr 1fr}
.query{flex-basis:104px}
tbody th{position:static}
}
"""

STYLE = (
    f":root{{{_LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + _LAYOUT
    + _TABLES
    + _CHARTS
    + _GALLERY
    + _SMALL
).replace("\n", "")
