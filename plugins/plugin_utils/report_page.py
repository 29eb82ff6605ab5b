# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan as one HTML page with a picture of every device: no script, nothing loaded from elsewhere.

The page is well-formed XML too. Every text goes through C(element), which escapes it.
"""

from __future__ import annotations

from html import escape
from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils import report

# Per kind its colour in the light and in the dark, and the sign that is drawn on it, so that colour is not all.
COLOURS = {
    "weights": ("#1f5fa8", "#6fb1f5"),
    "kv": ("#a8480f", "#f2a06b"),
    "compute": ("#2f6f3a", "#7fd08d"),
    "other": ("#7a3d8f", "#d39be6"),
    "reserved": ("#5c6470", "#a3adba"),
    "others": ("#8f1f2d", "#f2828e"),
    "left": ("#ffffff", "#14181d"),
}
TEXT = ("#1b1f24", "#e8ebef")
MUTED = ("#57606a", "#a5aeb8")
PAPER = ("#ffffff", "#14181d")
LINE = ("#c9d1d9", "#3a424c")
# Lines drawn over the colour: weights are plain, left is empty.
PATTERNS = {
    "kv": '<path d="M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4" {stroke}/>',
    "compute": '<circle cx="2" cy="2" r="1.2" {fill}/><circle cx="6" cy="6" r="1.2" {fill}/>',
    "other": '<path d="M4,0 v8 M0,4 h8" {stroke}/>',
    "reserved": '<path d="M-2,6 l4,4 M0,0 l8,8 M6,-2 l4,4" {stroke}/>',
    "others": '<path d="M0,0 l8,8 M8,0 l-8,8" {stroke}/>',
}
BAR_TOP, BAR_HEIGHT, PICTURE_HEIGHT = 34, 40, 96
# About how many characters of a label go on the whole width of a picture on a small screen.
CHARACTERS = 46
STYLE = """
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem; background: var(--paper); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .25rem; }}
p, ul {{ margin: .5rem 0; }}
.muted {{ color: var(--muted); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; }}
.legend svg {{ width: 28px; height: 14px; vertical-align: -2px; margin-right: .4rem; }}
.picture {{ display: block; width: 100%; height: {height}px; overflow: visible; }}
.picture text, .legend text {{ fill: var(--text); font: 13px system-ui, sans-serif; }}
.picture .axis {{ fill: var(--muted); font-size: 12px; }}
.frame {{ fill: none; stroke: var(--muted); }}
.span {{ fill: none; stroke: var(--muted); }}
{kinds}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }}
th {{ font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--line); }}
tbody th, tfoot th {{ color: inherit; border-bottom: 0; font-weight: 400; }}
.device table {{ width: auto; margin-top: .5rem; }}
.device th, .device td {{ padding-right: 1.5rem; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
tfoot td, tfoot th {{ border-top: 1px solid var(--line); }}
code {{ font-size: .85rem; overflow-wrap: anywhere; }}
.refused {{ border-left: 4px solid var(--others); padding-left: .75rem; }}
""".strip()


class Markup(str):
    """Text that is markup already; everything else is escaped."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Return an element; C(class_) is the attribute class, and C(aria_label) is C(aria-label)."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(report.clean(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(
        child if isinstance(child, Markup) else escape(report.clean(child)) for child in children if child is not None
    )
    if not children and name in ("meta", "rect", "line", "use", "circle", "path"):
        return Markup(f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{inner}</{name}>")


def joined(parts: list[Any]) -> Markup:
    """Return elements one after another, each on a line of its own."""
    return Markup("\n".join(part if isinstance(part, Markup) else escape(report.clean(part)) for part in parts if part))


def page(plan: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Return the page. The same plan gives the same bytes."""
    found = report.areas(plan)
    count = len(plan["instances"])
    servers = "1 server" if count == 1 else f"{count} servers"
    nodes = "1 node" if len(plan["nodes"]) == 1 else f"{len(plan['nodes'])} nodes"
    refused = f", {len(plan['refused'])} not planned" if plan["refused"] else ""
    body = [
        element("h1", "What runs where"),
        element("p", f"{servers} on {nodes}{refused}. Sizes are in MiB.", class_="muted"),
        _refused(plan),
        element("h2", "Servers"),
        _servers(plan),
        element("h2", "Memory"),
        _legend(found),
        *(_area(area, number) for number, area in enumerate(found)),
        _listed("Start order", report.starts(plan)),
        _listed("What survives", [entry["sentence"] for entry in plan.get("survival") or []]),
        _listed("Against the plan in force", _moves(before, plan)),
    ]
    head = [
        Markup('<meta charset="utf-8"/>'),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        Markup(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>"
        ),
        element("title", "What runs where"),
        Markup(f"<style>\n{_style()}\n</style>"),
    ]
    root = element(
        "html",
        joined([element("head", joined(head)), element("body", _patterns(), element("main", joined(body)))]),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{root}\n"


def _style() -> str:
    def variables(mode: int) -> str:
        named = {**COLOURS, "text": TEXT, "muted": MUTED, "paper": PAPER, "line": LINE}
        return " ".join(f"--{name}: {pair[mode]};" for name, pair in named.items())

    kinds = "\n".join(f".{kind} {{ fill: var(--{kind}); }}" for kind in COLOURS)
    return STYLE.format(light=variables(0), dark=variables(1), kinds=kinds, height=PICTURE_HEIGHT)


def _patterns() -> Markup:
    """Return what the pictures draw over the colours, once for the whole page."""
    drawn = [
        Markup(
            f'<pattern id="on-{kind}" width="8" height="8" patternUnits="userSpaceOnUse">'
            + lines.format(stroke='stroke="var(--paper)" stroke-width="1.6"', fill='fill="var(--paper)"')
            + "</pattern>"
        )
        for kind, lines in PATTERNS.items()
    ]
    return element(
        "svg", element("defs", joined(drawn)), width=0, height=0, aria_hidden="true", style="position:absolute"
    )


def _legend(found: list[report.Area]) -> Markup:
    used = {kind for area in found for _server, kind, _size in area.segments()}
    items = []
    for kind in report.SIGNS:
        if kind in used:
            swatch = element("svg", *_filled(kind, "0", "100%", 0, 14), _frame(0, 14), aria_hidden="true")
            items.append(element("li", swatch, report.NAMES[kind]))
    return element("ul", joined(items), class_="legend")


def _filled(kind: str, left: str, width: str, top: int, height: int) -> list[Markup]:
    shape = {"x": left, "y": top, "width": width, "height": height}
    drawn = [element("rect", class_=kind, **shape)]
    if kind in PATTERNS:
        drawn.append(element("rect", fill=f"url(#on-{kind})", **shape))
    return drawn


def _frame(top: int, height: int) -> Markup:
    return element("rect", class_="frame", x="0", y=top, width="100%", height=height)


def _area(area: report.Area, number: int) -> Markup:
    heading = f"{area.node} {area.where}"
    return element(
        "section",
        joined([element("h3", f"{heading} · {area.name}"), _picture(area, number), _numbers(area)]),
        class_="device",
    )


def sentence(area: report.Area) -> str:
    """Return in words what a picture shows."""
    active = [server for server in area.servers if not server.idle]
    told = [f"{server.name} takes {server.total}" for server in active] or ["no server"]
    told += [f"{area.reserved} reserved"] if area.reserved else []
    told += [f"{area.others} foreign"] if area.others else []
    told.append(f"{area.left} left" + (f", {area.over} more than there is" if area.over else ""))
    return f"Of {area.size} MiB: {'; '.join(told)}."


def _picture(area: report.Area, number: int) -> Markup:
    """Return the bar of one device; positions are in percent, so that text keeps its size on every screen."""
    total = area.size + area.over

    def share(size: int) -> float:
        return 100 * size / total if total else 0.0

    drawn: list[Markup] = [
        element("title", f"{area.node} {area.where}, {area.name}", id=f"title-{number}"),
        element("desc", sentence(area), id=f"desc-{number}"),
        element("rect", class_="left", x="0", y=BAR_TOP, width="100%", height=BAR_HEIGHT),
    ]
    at = 0
    for server, kind, size in area.segments():
        label = f"{server}, {report.NAMES[kind]}: {size} MiB".lstrip(", ")
        shapes = _filled(kind, f"{share(at):.4f}%", f"{share(size):.4f}%", BAR_TOP, BAR_HEIGHT)
        drawn.append(element("g", element("title", label), *shapes))
        at += size
    at = 0
    for server in area.servers:
        if not server.idle:
            drawn.append(_span(server.name, f"{server.total} MiB", share(at), share(server.total)))
            at += server.total
    rest = area.reserved + area.others
    if share(area.left) * CHARACTERS / 100 >= len(f"{area.left} left"):
        drawn.append(
            element(
                "text",
                f"{area.left} left",
                x=f"{share(at + rest) + share(area.left) / 2:.4f}%",
                y=BAR_TOP + BAR_HEIGHT / 2 + 5,
                text_anchor="middle",
            )
        )
    drawn.append(_frame(BAR_TOP, BAR_HEIGHT))
    drawn += _axis(area.size, share)
    return element(
        "svg",
        joined(drawn),
        class_="picture",
        role="img",
        aria_labelledby=f"title-{number} desc-{number}",
        height=PICTURE_HEIGHT,
    )


def _span(name: str, size: str, left: float, width: float) -> Markup:
    """Return the bracket above what one server takes, with its name where that fits."""
    room = width * CHARACTERS / 100
    label = next((text for text in (f"{name} {size}", name) if len(text) <= room), "")
    inner = [element("path", class_="span", d="M1,10 V2 H4000 V10", transform="translate(0 22)")]
    if label:
        inner.append(element("text", label, x=4, y=17))
    end = element("line", class_="span", x1="100%", x2="100%", y1=24, y2=32, transform="translate(-1 0)")
    return element("svg", *inner, end, x=f"{left:.4f}%", y=0, width=f"{width:.4f}%", height=BAR_TOP, overflow="hidden")


def _axis(size: int, share: Any) -> list[Markup]:
    """Return marks in GiB below the bar."""
    step = next((step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size / 1024 / step <= 5), 512)
    marks = []
    for gib in range(0, size // 1024 + 1, step):
        at = f"{share(gib * 1024):.4f}%"
        anchor = "start" if gib == 0 else "end" if share(gib * 1024) > 97 else "middle"
        top = BAR_TOP + BAR_HEIGHT
        marks.append(element("line", class_="frame", x1=at, x2=at, y1=top, y2=top + 5))
        marks.append(element("text", f"{gib} GiB" if gib else "0", class_="axis", x=at, y=top + 18, text_anchor=anchor))
    return marks


def _numbers(area: report.Area) -> Markup:
    """Return the same as a table."""
    kinds = [kind for kind in report.SERVER_KINDS if any(server.kinds[kind] for server in area.servers)]
    told = bool(kinds) and kinds != ["other"]
    head = ["", "MiB", *([report.NAMES[kind] for kind in kinds] if told else [])]
    rows = []
    for server in area.servers:
        cells = [_sized(server.kinds[kind], server.sources.get(kind)) for kind in kinds] if told else []
        name = f"{server.name} (in turn)" if server.idle else server.name
        rows.append(element("tr", element("th", name, scope="row"), _sized(server.total, None), *cells))
    blank = [element("td", "") for _kind in kinds] if told else []
    rest = [("reserved", area.reserved), ("foreign", area.others), ("left", area.left), ("too much", -area.over)]
    for name, size in rest:
        if size or name == "left":
            rows.append(element("tr", element("th", name, scope="row"), _sized(size, None), *blank))
    foot = element("tr", element("th", "all", scope="row"), _sized(area.size, None), *blank)
    return _table(head, rows, foot)


def _sized(size: int, source: str | None) -> Markup:
    mark = f" ({'upper bound' if source == 'bound' else source})" if source not in (None, "computed") else ""
    return element("td", f"{size}", element("span", mark, class_="muted") if mark else None, class_="number")


def _table(head: list[str], rows: list[Markup], foot: Markup | None = None, numbers: bool = True) -> Markup:
    titles = [
        element("th", title, scope="col", class_="number" if numbers and place else None)
        for place, title in enumerate(head)
    ]
    parts = [element("thead", element("tr", *titles)), element("tbody", joined(rows))]
    if foot:
        parts.append(element("tfoot", foot))
    return element(
        "div", element("table", joined(parts)), class_="scroll", tabindex=0, role="group", aria_label="Table"
    )


def _servers(plan: dict[str, Any]) -> Markup:
    if not plan["instances"]:
        return element("p", "No server is planned.")
    rows = []
    for instance in plan["instances"]:
        options = instance["server_options"]
        many = "1 slot" if report.slots(instance) == 1 else f"{report.slots(instance)} slots"
        flags = " ".join(f"--{key} {_flag(value)}".rstrip() for key, value in options.items())
        cells = [
            f"{instance['node']} {report.where(instance)}",
            report.quant(instance, plan),
            f"{many} of {report.context(instance)} tokens",
            options.get("cache-type-k", "f16"),
            str(instance["port"]),
            str(sum(instance["memory"].values())),
        ]
        told = [element("td", cell) for cell in cells]
        flagged = element("details", element("summary", "flags"), element("code", flags))
        name = element("th", instance["name"], scope="row")
        rows.append(element("tr", name, *told, element("td", report.how(instance), flagged)))
    return _table(["server", "where", "file", "context", "KV", "port", "MiB", "how"], rows, numbers=False)


def _flag(value: Any) -> str:
    if value is True:
        return ""
    return ",".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _refused(plan: dict[str, Any]) -> Markup | None:
    if not plan["refused"]:
        return None
    told = []
    for refusal in plan["refused"]:
        change = refusal.get("change")
        told.append(element("p", element("strong", refusal["model"]), f": {refusal['reason']}"))
        if change:
            told.append(element("p", f"It would fit with this: {change['sentence']}"))
    return element("section", element("h2", "Not planned"), joined(told), class_="refused")


def _moves(before: dict[str, Any] | None, plan: dict[str, Any]) -> list[str]:
    if before is None:
        return []
    return [move["sentence"] for move in report.moves(before, plan)] or ["Nothing moves."]


def _listed(title: str, sentences: list[str]) -> Markup | None:
    if not sentences:
        return None
    items = joined([element("li", sentence) for sentence in sentences])
    return element("section", element("h2", title), element("ul", items))
