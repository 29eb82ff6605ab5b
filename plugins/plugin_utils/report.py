# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan for people and programs: the table with its bars, the JSON document, and what would move.

A plan is what module vram_plan returned together with C(nodes) and C(models), which is what the lock holds. The page
with pictures is in report_page.py.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

VERSION = 1
MOST_COLUMNS = 100
LEAST_COLUMNS = 60
HOST = "host"
# The kinds of memory that are told apart, each with its sign in a bar: different in shape, not only in colour.
SIGNS = {
    "weights": "█",
    "kv": "▓",
    "compute": "▒",
    "other": "░",
    "reserved": "/",
    "others": "x",
    "left": "·",
}
NAMES = {
    "weights": "weights",
    "kv": "KV",
    "compute": "compute",
    "other": "other",
    "reserved": "reserved",
    "others": "foreign",
    "left": "left",
}
SERVER_KINDS = ("weights", "kv", "compute", "other")
# The planner's finer kinds; what is not here is "other" (overhead, projector, draft, prompt cache). A server on the
# processor holds most of its weights a second time, repacked.
FOLDED = {
    "weights": "weights",
    "repack": "weights",
    "mapped": "weights",
    "kv": "kv",
    "recurrent": "kv",
    "compute": "compute",
    "output": "compute",
}
FITS = {
    "split": "split over its cards",
    "experts_on_cpu": "experts on the processor",
    "layers_on_cpu": "layers on the processor",
    "cpu": "on the processor",
    "turns": "takes turns",
    "rpc": "over the network",
}


@dataclass(frozen=True)
class Server:
    """What one server takes of one area, in MiB by kind; the sources say how each number is known.

    Of servers that take turns the largest stands for all of them; the others are C(idle) in the picture.
    """

    name: str
    kinds: dict[str, int]
    sources: dict[str, str] = field(default_factory=dict)
    idle: bool = False

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Area:
    """One device, or the main memory of a node, and what lies in it, in MiB. The numbers add up to C(size)."""

    node: str
    where: str
    name: str
    size: int
    reserved: int
    others: int
    servers: list[Server]
    left: int
    over: int = 0

    @property
    def planned(self) -> int:
        """What servers take at most at one time."""
        return sum(server.total for server in self.servers if not server.idle)

    def segments(self) -> list[tuple[str, str, int]]:
        """Return C((server, kind, MiB)) from left to right, empty ones left out."""
        active = [server for server in self.servers if not server.idle]
        found = [(server.name, kind, size) for server in active for kind, size in server.kinds.items()]
        found += [("", "reserved", self.reserved), ("", "others", self.others), ("", "left", self.left)]
        return [segment for segment in found if segment[2] > 0]


def clean(value: Any) -> str:
    """Return a text without characters that a terminal or a page would act on; names come from files of strangers."""
    return "".join(
        " " if char in "\n\t" else "?" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else char
        for char in str(value)
    )


def spread(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Divide a whole number in proportion, without losing anything to rounding."""
    whole = sum(shares.values())
    if not whole:
        return dict.fromkeys(shares, 0)
    exact = {key: total * share / whole for key, share in shares.items()}
    parts = {key: int(value) for key, value in exact.items()}
    for key in sorted(exact, key=lambda key: parts[key] - exact[key])[: total - sum(parts.values())]:
        parts[key] += 1
    return parts


def areas(plan: dict[str, Any]) -> list[Area]:
    """Return all devices of a plan, node by node, and main memory where servers lie in it or there is nothing else."""
    found = []
    for host, node in plan["nodes"].items():
        told = (plan.get("devices") or {}).get(host, {})
        here = [instance for instance in plan["instances"] if instance["node"] == host]
        for device in node["devices"]:
            if told and device["id"] not in told:
                continue  # graphics built into the processor, beside a card: no model is placed there
            size, used = device.get("cap_mib") or device["memory_mib"], device.get("used_mib") or 0
            found.append(_area(host, device["id"], device["name"], (size, used), node, here, told))
        memory = (node["memory_mib"], node.get("memory_used_mib") or 0)
        main = _area(host, HOST, "main memory", memory, node, here, told)
        if main.servers or not node["devices"]:
            found.append(main)
    return found


def _area(
    host: str,
    where: str,
    name: str,
    known: tuple[int, int],
    node: dict[str, Any],
    instances: list[dict[str, Any]],
    told: dict[str, dict[str, int]],
) -> Area:
    numbers = told.get(where, {})
    size = numbers.get("size_mib", known[0])
    # What lies on a device with unified memory lies in main memory.
    unified = [device["id"] for device in node["devices"] if device.get("memory_kind") == "unified"]
    wheres = [HOST, *unified] if where == HOST else [where]
    servers = _idle([_server(instance, wheres) for instance in instances if _takes(instance, wheres)], instances)
    planned = sum(server.total for server in servers if not server.idle)
    reserved = numbers.get("reserved_mib", (node.get("reservations") or {}).get(where, 0))
    others = numbers.get("others_mib", known[1])
    left = size - planned - reserved - others
    if "left_mib" in numbers and left > numbers["left_mib"]:
        # What the planner may not use, whatever its reason, is not left.
        reserved, left = reserved + left - numbers["left_mib"], numbers["left_mib"]
    return Area(host, where, name, size, reserved, others, servers, max(left, 0), max(-left, 0))


def _takes(instance: dict[str, Any], wheres: list[str]) -> int:
    return sum(instance["memory"].get(where, 0) for where in wheres)


def _idle(servers: list[Server], instances: list[dict[str, Any]]) -> list[Server]:
    """Return the servers, those marked that wait for their turn while the largest of their group runs."""
    sizes = {server.name: server.total for server in servers}
    groups = {instance["name"]: [instance["name"], *(instance.get("turns") or [])] for instance in instances}

    def first(name: str) -> str:
        return max(sorted(groups[name]), key=lambda other: sizes.get(other, 0))

    return [server if first(server.name) == server.name else replace(server, idle=True) for server in servers]


def _server(instance: dict[str, Any], wheres: list[str]) -> Server:
    shares: dict[str, float] = dict.fromkeys(SERVER_KINDS, 0)
    sources: dict[str, set[str]] = {}
    for part in instance.get("parts") or []:
        if part["where"] in wheres and part["bytes"]:
            kind = FOLDED.get(part["kind"], "other")
            shares[kind] += part["bytes"]
            sources.setdefault(kind, set()).add(part.get("source", "computed"))
    if not any(shares.values()):
        shares["other"] = 1
    return Server(
        instance["name"],
        spread(_takes(instance, wheres), shares),
        {kind: _source(known) for kind, known in sources.items()},
    )


def _source(known: set[str]) -> str:
    """Return the weakest of several sources: a sum is as good as its worst part."""
    return next(source for source in ("bound", "computed", "calibrated", "measured", *known) if source in known)


def where(instance: dict[str, Any]) -> str:
    """Return in a word where a server lies."""
    devices = "+".join(instance["devices"])
    if not devices:
        return "cpu"
    return f"{devices}+cpu" if instance.get("fit") in ("experts_on_cpu", "layers_on_cpu") else devices


def slots(instance: dict[str, Any]) -> int:
    """Return how many requests a server answers at once."""
    return int(instance["server_options"].get("parallel", 1))


def context(instance: dict[str, Any]) -> int:
    """Return how many tokens one request may use."""
    options = instance["server_options"]
    shared = options.get("kv-unified") and not options.get("no-kv-unified")
    return int(options["ctx-size"]) if shared else int(options["ctx-size"]) // slots(instance)


def model_of(instance: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the files and shape that a server runs, empty where the plan does not tell."""
    model = (plan.get("models") or {}).get(instance["model"]) or {}
    return model["variants"][instance.get("variant") or 0] if model.get("variants") else model


def quant(instance: dict[str, Any], plan: dict[str, Any]) -> str:
    """Return the quantisation that a server runs."""
    return str(instance.get("quant") or model_of(instance, plan).get("quant") or "-")


def how(instance: dict[str, Any]) -> str:
    """Return in words what is special about the way a server runs, else nothing."""
    told = FITS.get(instance.get("fit", ""), "")
    options = instance["server_options"]
    if instance.get("fit") == "experts_on_cpu" and options.get("n-cpu-moe"):
        told = f"experts of {options['n-cpu-moe']} layers on the processor"
    if instance.get("fit") == "layers_on_cpu":
        told = f"{options['n-gpu-layers']} layers on the card, the others on the processor"
    if instance.get("turns"):
        told = f"{FITS['turns']} with {', '.join(instance['turns'])}"
    return told


# The terminal


def table(plan: dict[str, Any], before: dict[str, Any] | None = None, width: int = 80) -> str:
    """Return the plan as text for people.

    :param before: the plan in force, to say what would move against it.
    :param width: columns of the terminal; never more than 100 are used.
    """
    width = max(min(width, MOST_COLUMNS), LEAST_COLUMNS)
    blocks = [_servers(plan, width), _memory(plan, width), _refused(plan, width)]
    blocks += [_order(plan, width), _survival(plan, width)]
    if before is not None:
        told = [move["sentence"] for move in moves(before, plan)]
        blocks.append(_listed("AGAINST THE PLAN IN FORCE", told or ["Nothing moves."], width))
    return "\n\n".join(block for block in blocks if block)


def _servers(plan: dict[str, Any], width: int) -> str:
    if not plan["instances"]:
        return "No server is planned."
    rows: list[tuple[str, ...]] = [("SERVER", "NODE", "WHERE", "PORT", "QUANT", "CONTEXT", "SLOTS", "KV", "MiB")]
    for instance in plan["instances"]:
        options = instance["server_options"]
        cells = [instance["name"], instance["node"], where(instance), instance["port"], quant(instance, plan)]
        cells += [context(instance), slots(instance), options.get("cache-type-k", "f16"), _total(instance)]
        rows.append(tuple(clean(cell) for cell in cells))
    lines = columns(rows, right=(3, 5, 6, 8))
    if max(len(line) for line in lines) > width:
        lines = []
        for name, host, place, port, kept, tokens, number, kv, size in rows[1:]:
            lines.append(f"{name}  {host}  {place}"[:width])
            many = "1 slot" if number == "1" else f"{number} slots"
            lines += wrapped(
                f"{kept}, {many} of {tokens} tokens, KV {kv}, port {port}, {size} MiB", width, "    ", "    "
            )
    for instance in plan["instances"]:
        if how(instance) and instance.get("fit") not in ("cpu", "split"):
            lines += wrapped(f"{clean(instance['name'])}: {clean(how(instance))}", width, "  ", "    ")
    return "\n".join(lines)


def _total(instance: dict[str, Any]) -> int:
    return sum(instance["memory"].values())


def columns(rows: list[tuple[str, ...]], right: Iterable[int] = ()) -> list[str]:
    """Return rows as lines of aligned columns; those in C(right) are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(size) if column in right else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _memory(plan: dict[str, Any], width: int) -> str:
    found = areas(plan)
    if not found:
        return ""
    used = {kind for area in found for _server_name, kind, _size in area.segments()}
    lines = ["MEMORY in MiB  " + "  ".join(f"{sign} {NAMES[kind]}" for kind, sign in SIGNS.items() if kind in used)]
    if len(lines[0]) > width:
        lines = wrapped(lines[0], width, "", " " * 15)
    for area in found:
        lines += ["", f"{clean(area.node)} {clean(area.where)} ({clean(area.name)})"[:width], gauge(area, width)]
        lines += _per_server(area, width)
        rest = [f"{NAMES['reserved']} {area.reserved}"] if area.reserved else []
        rest += [f"{NAMES['others']} {area.others}"] if area.others else []
        text = f"{area.left} of {area.size} left" + (f", {', '.join(rest)}" if rest else "")
        if area.over:
            text += f"; {area.over} MORE THAN THERE IS"
        lines += wrapped(text, width, "  ", "    ")
    return "\n".join([*lines, *_sources(found, width)])


def _per_server(area: Area, width: int) -> list[str]:
    """Say what each server takes of an area, kind by kind where that is known."""
    kinds = [kind for kind in SERVER_KINDS if any(server.kinds[kind] for server in area.servers)]
    rows: list[tuple[str, ...]]
    if kinds == ["other"]:
        rows = [(_named(server), str(server.total)) for server in area.servers]
    else:
        rows = [
            (
                _named(server),
                str(server.total),
                *(cell for kind in kinds for cell in (NAMES[kind], str(server.kinds[kind]))),
            )
            for server in area.servers
        ]
    if not rows:
        return []
    lines = ["  " + line for line in columns(rows, right=(1, 3, 5, 7, 9))]
    if max(len(line) for line in lines) <= width:
        return lines
    lines = []
    for server in area.servers:
        told = ", ".join(f"{NAMES[kind]} {server.kinds[kind]}" for kind in kinds)
        lines += wrapped(f"{_named(server)} {server.total}: {told}", width, "  ", "    ")
    return lines


def _named(server: Server) -> str:
    return f"{clean(server.name)}{' (in turn)' if server.idle else ''}"


def _sources(found: list[Area], width: int) -> list[str]:
    """Say which numbers are more, or less, than computed from the header."""
    words = {
        "measured": "Measured",
        "calibrated": "Calibrated by the engine itself",
        "bound": "Upper bounds, not exact",
    }
    lines = []
    for source, word in words.items():
        kinds: dict[str, dict[str, None]] = {}
        rest = set()
        for area in found:
            for server in area.servers:
                known = [kind for kind, how_known in server.sources.items() if how_known == source]
                kinds.setdefault(clean(server.name), {}).update(dict.fromkeys(known))
                rest |= {clean(server.name)} if len(known) < len(server.sources) else set()
        alike = {tuple(own) for own in kinds.values()}
        if len(alike) == 1 and len(kinds) > 1 and rest == set(kinds):
            names = [f"{' and '.join(NAMES[kind] for kind in own)} of all servers" for own in alike if own]
        else:
            names = [
                f"{name} ({', '.join(NAMES[kind] for kind in own)})" if name in rest else name
                for name, own in kinds.items()
                if own
            ]
        if names:
            lines += wrapped(f"{word}: {', '.join(names)}", width, "", "  ")
    return ["", *lines] if lines else []


def gauge(area: Area, width: int) -> str:
    """Return an area as a bar of signs; what is there at all has at least one."""
    cells = width - 4
    segments = area.segments()
    total = sum(size for _server_name, _kind, size in segments)
    counts = [1] * len(segments)
    exact = [size * cells / total for _server_name, _kind, size in segments]
    while sum(counts) < cells and segments:
        number = max(range(len(segments)), key=lambda number: exact[number] - counts[number])
        counts[number] += 1
    return "  [" + "".join(SIGNS[kind] * count for (_name, kind, _size), count in zip(segments, counts)) + "]"


def wrapped(text: str, width: int, first: str, later: str) -> list[str]:
    """Return a text in lines of at most C(width) columns; long names are not broken."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _listed(title: str, sentences: list[str], width: int) -> str:
    lines = [title]
    for sentence in sentences:
        lines += wrapped(clean(sentence), width, "  ", "    ")
    return "\n".join(lines)


def _refused(plan: dict[str, Any], width: int) -> str:
    lines = []
    for refusal in plan["refused"]:
        lines += wrapped(f"NOT PLANNED {clean(refusal['model'])}: {clean(refusal['reason'])}", width, "", "  ")
        if refusal.get("change"):
            lines += wrapped(f"It would fit with this: {clean(refusal['change']['sentence'])}", width, "  ", "    ")
    return "\n".join(lines)


def starts(plan: dict[str, Any]) -> list[str]:
    """Say in which order servers start on each node, and whom one of them has to wait for."""
    before = {instance["name"]: instance.get("stop_first") or [] for instance in plan["instances"]}
    found = []
    for host, names in (plan.get("order") or {}).items():
        told = [f"{name} (once {' and '.join(before[name])} stopped)" if before.get(name) else name for name in names]
        if told:
            found.append(f"{host}: {', '.join(told)}")
    return found


def _order(plan: dict[str, Any], width: int) -> str:
    sentences = starts(plan)
    return _listed("START ORDER", sentences, width) if sentences else ""


def _survival(plan: dict[str, Any], width: int) -> str:
    sentences = [entry["sentence"] for entry in plan.get("survival") or []]
    return _listed("WHAT SURVIVES", sentences, width) if sentences else ""


# What moves


def moves(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, str]]:
    """Return what a plan would do to the servers of the plan in force: C({server, model, kind, sentence}).

    The kinds are C(leaves), C(moves), C(changes), C(starts) and C(refused), in the order in which people ask.
    """
    old = {instance["name"]: instance for instance in before["instances"]}
    new = {instance["name"]: instance for instance in after["instances"]}
    found: dict[str, list[dict[str, str]]] = {kind: [] for kind in ("refused", "leaves", "moves", "changes", "starts")}

    def tell(kind: str, instance: dict[str, Any], sentence: str) -> None:
        found[kind].append({"server": instance["name"], "model": instance["model"], "kind": kind, "sentence": sentence})

    known = {refusal["model"] for refusal in before["refused"]}
    lost = {refusal["model"] for refusal in after["refused"]} - known - {one["model"] for one in after["instances"]}
    successors = _successors(old, new)
    for name, instance in old.items():
        place, now = f"{instance['node']} {where(instance)}", successors.get(name)
        if now is None:
            if instance["model"] not in lost:  # else it is said once, with the reason
                tell("leaves", instance, f"{name} leaves {place}")
            continue
        place_now = f"{now['node']} {where(now)}" + (f" as {now['name']}" if now["name"] != name else "")
        changed = _changed(instance, now, before, after)
        also = f", with {', '.join(changed)}" if changed else ""
        if place != place_now:
            tell("moves", now, f"{name} moves from {place} to {place_now}{also}")
        elif changed:
            tell("changes", now, f"{name} on {place} changes: {', '.join(changed)}")
    there = {instance["name"] for instance in successors.values()}
    for name, instance in new.items():
        if name not in there:
            tell("starts", instance, f"{name} starts on {instance['node']} {where(instance)}, {_total(instance)} MiB")
    ran = {instance["model"] for instance in before["instances"]}
    for refusal in after["refused"]:
        if refusal["model"] not in known:
            more = " any more" if refusal["model"] in ran else ""
            sentence = f"{refusal['model']} has no place{more}: {refusal['reason']}"
            found["refused"].append({"server": "", "model": refusal["model"], "kind": "refused", "sentence": sentence})
    return [move for kind in found.values() for move in kind]


def _successors(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each server that goes on the one that takes its place: of its name, else another one of its model."""
    found = {name: new[name] for name in old if name in new}
    free = [instance for name, instance in new.items() if name not in old]
    for name, instance in old.items():
        for other in free if name not in found else []:
            if other["model"] == instance["model"]:
                found[name] = other
                free.remove(other)
                break
    return found


def _changed(old: dict[str, Any], new: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two states of one server, as it was and as it is."""
    found = []
    if quant(old, before) != quant(new, after):
        found.append(f"{quant(old, before)} -> {quant(new, after)}")
    elif _files(old, before) != _files(new, after):
        found.append("other files of the model")
    for key, title in (("port", "port"), ("backend", "backend")):
        if old[key] != new[key]:
            found.append(f"{title} {old[key]} -> {new[key]}")
    was, now = old["server_options"], new["server_options"]
    for option in [*was, *(option for option in now if option not in was)]:
        if was.get(option) != now.get(option):
            found.append(f"{option} {_value(was.get(option))} -> {_value(now.get(option))}")
    return found


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    return "/".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _files(instance: dict[str, Any], plan: dict[str, Any]) -> list[tuple[Any, ...]]:
    files = model_of(instance, plan).get("files", [])
    return [(file["name"], file["size"], file.get("sha256")) for file in files]


# For programs


def document(plan: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the plan for programs: sizes in MiB, one entry for each device, server, refusal and move."""
    return {
        "plan_version": VERSION,
        "devices": [
            {
                "node": area.node,
                "device": area.where,
                "name": area.name,
                "size_mib": area.size,
                "reserved_mib": area.reserved,
                "others_mib": area.others,
                "planned_mib": area.planned,
                "left_mib": area.left,
                "over_mib": area.over,
                "servers": [
                    {
                        "server": server.name,
                        "total_mib": server.total,
                        "in_turn": server.idle,
                        **{f"{kind}_mib": size for kind, size in server.kinds.items()},
                        "sources": server.sources,
                    }
                    for server in area.servers
                ],
            }
            for area in areas(plan)
        ],
        "servers": [
            {
                "server": instance["name"],
                "model": instance["model"],
                "node": instance["node"],
                "devices": instance["devices"],
                "backend": instance["backend"],
                "port": instance["port"],
                "mode": instance["mode"],
                "quant": quant(instance, plan),
                "context": context(instance),
                "slots": slots(instance),
                "fit": instance.get("fit"),
                "turns": instance.get("turns") or [],
                "stop_first": instance.get("stop_first") or [],
                "quality": instance.get("quality"),
                "memory_mib": instance["memory"],
                "parts": instance.get("parts") or [],
                "server_options": instance["server_options"],
            }
            for instance in plan["instances"]
        ],
        "refused": plan["refused"],
        "order": plan.get("order") or {},
        "survival": plan.get("survival") or [],
        "value": plan.get("value"),
        "moves": moves(before, plan) if before is not None else [],
    }
