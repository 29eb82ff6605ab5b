# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Would it fit? Each file of a model on each node, beside what runs or instead of what.

And how long a context it could have there, and how many bytes have to be fetched.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import predict, totals
from ansible_collections.homelab.inference.plugins.module_utils.planner import choices as ways
from ansible_collections.homelab.inference.plugins.module_utils.planner.footprint import Footprints
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import Room, backend
from ansible_collections.homelab.inference.plugins.plugin_utils import lab as lab_module
from ansible_collections.homelab.inference.plugins.plugin_utils import planning, progress, report, what_if
from ansible_collections.homelab.inference.plugins.plugin_utils.schema import nearest

# The quantisations that are looked at where nobody names any: of each number of bits the usual one. Only those that the
# repository has are answered, and only their headers are fetched.
QUANTS = ("BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "MXFP4", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
REPO = re.compile(r"^[\w.-]+/[\w.-]+?(?::(?P<quant>[\w.-]+))?$")
HUB = re.compile(r"^https://(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<rest>.*))?$")
# The search's quick numbers are within this part of what a server really takes.
NEAR = 0.03
# Contexts are told in steps of this many tokens.
GRAIN = 1024
# Up to so many servers on a node every set of them is tried in place of the model, above it only the least important.
ALL_SETS = 8


# What is asked


def question(lab: dict[str, Any], words: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be answered, and which sources have to be asked for it.

    :param lab: what action C(lab) returned.
    :param words: C({model, quant, context, slots, without, plus, directory}) from the command line, absent ones None;
        relative paths start at C(directory).
    :returns: C({name, models, nodes, changes, sources, problems}); with problems nothing else counts.
    """
    hosts = lab["declaration"]["groups"]["inference"]
    nodes, changes, problems = what_if.change(lab["nodes"], hosts, words.get("without"), words.get("plus"))
    models, name = dict(lab["models"]), None
    if words.get("model"):
        name, model, problem = _candidate(lab, words)
        problems += [problem] if problem else []
        if model:
            models[name] = model
    elif not changes and not problems:
        problems.append(
            "Nothing is asked. Say a model (-e model=NAME, a repository, an address or a path), "
            "-e without=NODE, or -e plus=NODE:32GiB."
        )
    if not nodes and not problems:
        problems.append("No hardware is known: no node answered, and none declares node_gpus and node_memory_mib.")
    known = lab["lock"]["declared"]["models"] if lab["lock"] else {}
    asked = {
        key: model
        for key, model in models.items()
        if key == name
        or key not in (lab["lock"] or {}).get("models", {})
        or known.get(key, {}).get("source") != model["source"]
    }
    return {
        "name": name,
        "models": models,
        "nodes": nodes,
        "silent": [host for host in hosts if host not in lab["nodes"]],
        "changes": changes,
        "sources": [] if problems else planning.sources(asked, lab["inventory_dir"]),
        "problems": problems,
    }


def _candidate(lab: dict[str, Any], words: dict[str, Any]) -> tuple[str, dict[str, Any] | None, str]:
    """Return C((name, model in normal form, problem)) for the word C(model)."""
    word = str(words["model"])
    own = lab["models"].get(word)
    if own:
        name, model = word, dict(own)
    else:
        found = _source(word, lab, Path(words.get("directory") or "."))
        if found is None:
            known = [*lab["models"], *(entry["name"] for entries in lab["libraries"].values() for entry in entries)]
            return (
                word,
                None,
                f"{word!r} is no model of lab_models, no file of a library, no path of a file, no repository "
                f"(owner/name) and no address{nearest(word, known)}.",
            )
        name, source = found
        model = lab_module.normal_model(name, {"source": source})
    if words.get("quant") and "hf" not in model["source"]:
        return name, None, f"quant chooses among the files of a repository, and {word} is one file; leave it out."
    if "hf" in model["source"] and "file" not in model["source"]:
        chosen = what_if.listed(words.get("quant")) or model["source"].get("quant") or []
        chosen = [chosen] if isinstance(chosen, str) else list(chosen)
        model["source"] = {**model["source"], "quant": chosen or list(QUANTS)}
        if own and not words.get("quant"):
            # What the owner prefers comes first; what else there is may be worth knowing.
            model["source"]["quant"] += [quant for quant in QUANTS if quant not in chosen]
    for key in ("context", "slots"):
        if words.get(key):
            values = what_if.listed(words[key])
            if not all(str(value).isdigit() and int(value) > 0 for value in values):
                return name, None, f"{key} is {words[key]!r}; write a number, or several with commas between them."
            model[key] = [int(value) for value in values]
    # Every node is a question of its own here, and nothing takes turns.
    return name, {**model, "nodes": None, "replicas": 1, "keep": ["always"]}, ""


def _source(word: str, lab: dict[str, Any], directory: Path) -> tuple[str, dict[str, Any]] | None:
    """Return C((name, source)) for what somebody wrote as a model."""
    hub = HUB.match(word)
    if hub:
        rest = (hub["rest"] or "").split("/")
        source: dict[str, Any] = {"hf": hub["repo"]}
        if rest[0] in ("blob", "resolve") and len(rest) > 2:
            source |= {"revision": rest[1], "file": "/".join(rest[2:]).partition("?")[0]}
        return _name(str(source.get("file", hub["repo"]))), source
    if "://" in word:
        return _name(word.partition("?")[0]), {"url": word}
    for entries in lab["libraries"].values():
        if any(word in (entry["name"], entry["path"]) for entry in entries):
            return _name(word), {"library": word}
    path = directory / Path(word).expanduser()
    if path.is_file():
        return _name(word), {"file": str(path.resolve())}
    repo = REPO.match(word)
    if repo and not word.endswith(".gguf"):
        source = {"hf": word.partition(":")[0]}
        return _name(source["hf"]), {**source, **({"quant": repo["quant"]} if repo["quant"] else {})}
    return None


def _name(word: str) -> str:
    """Return a model's name made from a path, an address or a repository."""
    return re.sub(r"(?i)(\.gguf$|-GGUF$)", "", word.rstrip("/").rsplit("/", 1)[-1]) or "model"


# What is answered


@dataclass
class Row:
    """One file on one node."""

    quant: str
    size: int
    node: str
    answer: str  # beside, instead, no
    choice: Any = None  # a ways.Choice where it fits
    longest: int = 0
    fetch: int = 0
    gone: tuple[dict[str, Any], ...] = ()
    goes: tuple[str, ...] = ()  # per server that is gone, a sentence about what becomes of it
    short: int = 0
    where: str = ""


class Fit:
    """One model against all nodes of a lab, which may be one that does not exist yet."""

    def __init__(
        self,
        name: str,
        models: dict[str, dict[str, Any]],
        resolved: dict[str, dict[str, Any]],
        nodes: dict[str, dict[str, Any]],
        instances: list[dict[str, Any]],
    ) -> None:
        self.name, self.models, self.resolved, self.nodes = name, models, resolved, nodes
        self.instances = [one for one in instances if one["model"] != name and one["node"] in nodes]
        # What this model runs already makes way for itself, and its files are there.
        self.own = [one for one in instances if one["model"] == name]
        self.footprints = Footprints()
        self.rooms = {host: Room({host: node}) for host, node in nodes.items()}
        self.kept: dict[Any, list[ways.Choice]] = {}

    def rows(self) -> Iterator[Row]:
        """Yield the answers, file by file."""
        for number, variant in enumerate(ways.variants(self.resolved[self.name])):
            for host in self.nodes:
                yield from self.on_node(number, variant, host)

    def on_node(self, number: int, variant: dict[str, Any], host: str) -> Iterator[Row]:
        """Yield what one file can do on one node: beside what runs there, and better in place of something."""
        room = self.rooms[host]
        here = [one for one in self.instances if one["node"] == host]
        found = self.choices(self.name, host, number)
        quant = variant.get("quant") or variant["shape"].get("quant") or "-"
        row = Row(quant, sum(file["size"] for file in variant["files"]), host, "no")
        row.fetch = self.fetch(variant, host, row.size)
        alone = self.best(self.name, found, [variant], room.free())
        if alone is None:
            near = min(found, key=lambda choice: _lack(choice.needs, room.free()))
            row.short, at = _lack(self.exact(self.name, near, variant).needs, room.free())
            row.short, row.where = max(row.short, 1), room.names[at][1]
            yield row
            return
        left = self.free(host, here)
        beside = self.best(self.name, found, [variant], left)
        if beside:
            yield replace(row, answer="beside", choice=beside, longest=self.longest(beside, variant, left))
        # Other servers are named only for a place on cards: all of the model, or all but its experts.
        if beside is None or rank(alone) < min(rank(beside), RANKS["layers_on_cpu"]):
            gone, choice = self.makes_way([one for one in found if rank(one) <= rank(alone)], variant, host, here)
            stays = self.free(host, [one for one in here if one not in gone])
            goes = tuple(self.homes(list(gone), host, choice))
            longest = self.longest(choice, variant, stays)
            yield replace(row, answer="instead", choice=choice, longest=longest, gone=gone, goes=goes)

    def choices(self, name: str, host: str, quant: int | None = None) -> list[ways.Choice]:
        """Return all ways in which a model could run on a node, whether or not there is room."""
        if (name, host, quant) not in self.kept:
            resolved = self.resolved[name]
            if quant is not None:
                resolved = ways.variants(resolved)[quant]
            # The number of the file is lost where there is only one left; the footprints are kept by it.
            model = {**self.models[name], "name": f"{name} {quant}", "keep": ["always"]}
            self.kept[name, host, quant] = list(
                ways.choices(model, resolved, host, self.rooms[host], self.footprints, all_of_them=True)
            )
        return self.kept[name, host, quant]

    def free(self, host: str, instances: list[dict[str, Any]]) -> list[int]:
        """Return what some servers leave of each bin of a node; of those that take turns the largest counts."""
        room = self.rooms[host]
        left = room.free()
        groups: dict[Any, dict[int, int]] = {}
        for one in instances:
            memory = {where: size for where, size in one["memory"].items() if (host, where) in room.bins}
            group = frozenset([one["name"], *(one.get("turns") or [])])
            held = groups.setdefault(group, {})
            for at, size in room.needs(host, memory):
                held[at] = max(held.get(at, 0), size)
        for held in groups.values():
            for at, size in held.items():
                left[at] -= size
        return left

    def makes_way(
        self, found: list[ways.Choice], variant: dict[str, Any], host: str, here: list[dict[str, Any]]
    ) -> tuple[tuple[dict[str, Any], ...], ways.Choice]:
        """Return the servers of least importance in whose place the model can run, and how it then runs.

        :param found: ways that fit where nothing else is there, or some of them.
        """
        here = sorted(here, key=lambda one: (self.priority(one), -sum(one["memory"].values()), one["name"]))
        if len(here) <= ALL_SETS:
            sets = [chosen for size in range(len(here) + 1) for chosen in itertools.combinations(here, size)]
            sets.sort(key=lambda chosen: (sum(self.priority(one) for one in chosen), len(chosen)))
        else:
            sets = [*((one,) for one in here), *(tuple(here[:size]) for size in range(2, len(here) + 1))]
        for chosen in sets:
            left = self.free(host, [one for one in here if one not in chosen])
            choice = self.best(self.name, found, [variant], left)
            if choice:
                return chosen, choice
        raise ValueError("no set of servers makes way, not even all of them")

    def priority(self, instance: dict[str, Any]) -> int:
        """Return the priority of a server's model; what left the declaration has none."""
        return int(self.models.get(instance["model"], {}).get("priority", 0))

    def homes(self, gone: list[dict[str, Any]], host: str, choice: ways.Choice) -> Iterator[str]:
        """Say of each server that made way what would become of it."""
        left = {
            other: self.free(other, [one for one in self.instances if one["node"] == other and one not in gone])
            for other in self.nodes
        }
        for at, size in choice.needs:
            left[host][at] -= size
        for one in sorted(gone, key=lambda one: -self.priority(one)):
            name, model = one["model"], self.models.get(one["model"])
            others = [other for other in self.instances if other["model"] == name and other not in gone]
            if others:
                yield f"{one['name']} (another one stays on {others[0]['node']})"
                continue
            if model is None or name not in self.resolved:
                yield f"{one['name']} (nothing is known of its files)"
                continue
            allowed = [
                other
                for other in model["nodes"] or self.nodes
                if other in self.nodes and (model["nodes"] or self.nodes[other]["presence"] == "always")
            ]
            files = ways.variants(self.resolved[name])
            found = [(self.best(name, self.choices(name, other), files, left[other]), other) for other in allowed]
            fitting = [(way, other) for way, other in found if way]
            if not fitting:
                yield f"{one['name']} (which then has no place)"
                continue
            way, other = min(fitting, key=lambda pair: -pair[0].quality)
            for at, size in way.needs:
                left[other][at] -= size
            yield f"{one['name']} (which then runs on {other} {place(way)}, {way.step.context} tokens)"

    def exact(self, name: str, choice: ways.Choice, variant: dict[str, Any]) -> ways.Choice:
        """Return a choice with what it really takes: the search counts with quick numbers."""
        place, node = choice.place, self.nodes[choice.place.host]
        own = {device["id"]: device for device in node["devices"]}
        devices = [own[device] for device in place.devices]
        options = ways.server_options(self.models[name], choice.step, place, variant["shape"])
        engine = backend(devices[0]) if devices else "cpu"
        more = {key: variant.get(key) for key in ("calibration", "projector", "draft")}
        parts = predict(variant["shape"], options, devices, engine, overheads=node.get("overheads"), **more)
        memory = {where: size for where, size in totals(parts).items() if size}
        return replace(choice, memory=memory, needs=self.rooms[place.host].needs(place.host, memory))

    def best(
        self, name: str, found: list[ways.Choice], files: list[dict[str, Any]], free: list[int]
    ) -> ways.Choice | None:
        """Return the best of some ways for which there is room.

        :param files: the variants that the choices number.
        """
        near = [choice for choice in found if _room_for(choice.needs, free, NEAR)]
        for choice in sorted(near, key=lambda choice: (-choice.quality, len(choice.place.devices))):
            exact = self.exact(name, choice, files[choice.step.quant])
            if _room_for(exact.needs, free):
                return exact
        return None

    def longest(self, choice: ways.Choice, variant: dict[str, Any], free: list[int]) -> int:
        """Return the longest context with which a model runs at the same place, in the same number of slots."""
        model = self.models[self.name]
        trained = int(variant["shape"].get("context_length") or choice.step.context)
        if model["mode"] == "embedding":
            return choice.step.context

        def fits(context: int) -> bool:
            longer = replace(choice, step=replace(choice.step, context=context))
            return _room_for(self.exact(self.name, longer, variant).needs, free)

        low, high = choice.step.context // GRAIN, max(trained, choice.step.context) // GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * GRAIN) else (low, middle - 1)
        return max(low * GRAIN, choice.step.context)

    def fetch(self, variant: dict[str, Any], host: str, size: int) -> int:
        """Return how many bytes have to reach a node: none where the files lie there, or the model runs already."""
        if placement.in_place(variant["files"], self.nodes[host]["library"]):
            return 0
        known = ways.variants(self.resolved[self.name])
        for one in self.own:
            number = one.get("variant") or 0
            if (
                one["node"] == host
                and number < len(known)
                and one.get("quant", variant.get("quant")) == variant.get("quant")
            ):
                return 0
        return size


RANKS = {"one_gpu": 0, "split": 0, "experts_on_cpu": 1, "layers_on_cpu": 2, "cpu": 3}


def rank(choice: ways.Choice) -> int:
    """Return how far a model is from running on cards alone; a difference in it is worth naming another server for."""
    return RANKS[choice.place.fit]


def _lack(needs: tuple[tuple[int, int], ...], free: list[int]) -> tuple[int, int]:
    """Return by how many MiB something does not fit, and in which bin that is worst."""
    return max((size - free[at], at) for at, size in needs)


def _room_for(needs: tuple[tuple[int, int], ...], free: list[int], slack: float = 0.0) -> bool:
    return all(size <= free[at] + slack * size for at, size in needs)


def place(choice: ways.Choice) -> str:
    """Return in a word where a model would run."""
    devices = "+".join(choice.place.devices)
    if not devices:
        return "cpu"
    return f"{devices}+cpu" if rank(choice) else devices


def answer(
    lab: dict[str, Any], asked: dict[str, Any], found: list[dict[str, Any]], problems: list[dict[str, str]]
) -> dict[str, Any]:
    """Return C({rows, plan, before, problem}).

    :param asked: what C(question) returned.
    :param found: what module model_source_info found, and its problems.
    """
    name, models, nodes, lock = asked["name"], asked["models"], asked["nodes"], lab["lock"]
    resolved = planning.resolve(models, found, lab["libraries"], lock, lab.get("taken"))
    if name and name not in resolved:
        reasons = planning.unresolved({name: models[name]}, problems, lab["libraries"])
        return {
            "rows": [],
            "plan": None,
            "before": None,
            "problem": reasons.get(name, f"The files of {name} are not known"),
        }
    before = lock or _plan(lab, lab["nodes"], resolved, None)
    plan = _plan(lab, nodes, resolved, before) if asked["changes"] else before
    rows = list(Fit(name, {**lab["models"], **models}, resolved, nodes, plan["instances"]).rows()) if name else []
    return {"rows": rows, "plan": plan, "before": before, "problem": "", "resolved": resolved.get(name)}


def _plan(
    lab: dict[str, Any],
    nodes: dict[str, dict[str, Any]],
    resolved: dict[str, dict[str, Any]],
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return a plan of the declared models in the shape of the lock."""
    previous, known = (before["instances"], before["nodes"]) if before else ([], {})
    own = {name: resolved[name] for name in lab["models"] if name in resolved}
    plan = placement.plan(lab["models"], own, nodes, previous, {}, previous_nodes=known)
    for refusal in plan["refused"]:
        # The planner knows of no other reason why a node may be missing.
        for host in set(lab["nodes"]) - set(nodes):
            told = f"{host} did not answer and declares no hardware"
            refusal["reason"] = refusal["reason"].replace(told, f"it may run on {host} alone")
    return {**plan, "nodes": plan.get("nodes", nodes), "models": own}


# The terminal


def table(asked: dict[str, Any], answered: dict[str, Any], width: int = 80) -> str:
    """Return the answer as text for people."""
    width = max(min(width, report.MOST_COLUMNS), report.LEAST_COLUMNS)
    blocks = []
    if asked["name"]:
        blocks.append(_rows(asked, answered, width))
    if asked["changes"]:
        title = f"THE LAB {', '.join(asked['changes'])}"
        blocks.append("\n".join(report.wrapped(report.clean(title), width, "", "  ")))
        blocks.append(report.table(answered["plan"], answered["before"], width))
        worth = [report.clean(answered[key].get("value")) for key in ("before", "plan")]
        if "None" not in worth:
            blocks.append(f"The sum of priority x quality is {worth[1]}; in the plan in force it is {worth[0]}.")
    return "\n\n".join(blocks)


def _rows(asked: dict[str, Any], answered: dict[str, Any], width: int) -> str:
    rows: list[Row] = answered["rows"]
    variant = ways.variants(answered["resolved"])[0]
    shape = variant["shape"]
    trained = f", trained for {shape['context_length']} tokens" if shape.get("context_length") else ""
    lines = report.wrapped(
        f"{report.clean(asked['name'])} ({report.clean(shape.get('architecture', '?'))}{trained})", width, "", "  "
    )
    fitting = [row for row in rows if row.choice]
    if fitting:
        cells: list[tuple[str, ...]] = [
            ("FILE", "NODE", "WHERE", "CONTEXT", "LONGEST", "SLOTS", "KV", "MiB", "FETCH", "")
        ]
        cells += [_cells(row) for row in fitting]
        told = report.columns(cells, right=(3, 4, 5, 7, 8))
        if max(len(line) for line in told) > width:
            told = report.columns([(*cell[:5], *cell[7:]) for cell in cells], right=(3, 4, 5, 6))
        lines += ["", *(line[:width] for line in told)]
    notes = _notes(rows)
    if notes:
        lines.append("")
        for note in notes:
            lines += report.wrapped(report.clean(note), width, "", "  ")
    lines += ["", *report.wrapped(report.clean(verdict(asked, rows)), width, "", "  ")]
    for host in asked["silent"]:
        lines += report.wrapped(f"{report.clean(host)} did not answer and declares no hardware.", width, "", "  ")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    choice = row.choice
    return (
        report.clean(row.quant),
        report.clean(row.node),
        place(choice),
        str(choice.step.context),
        str(row.longest),
        str(choice.step.slots),
        choice.step.kv,
        str(sum(choice.memory.values())),
        progress.size(row.fetch) if row.fetch else "is there",
        row.answer,
    )


def _notes(rows: list[Row]) -> list[str]:
    """Say in place of what a model would run, and by how much it does not fit."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.answer == "instead":
            notes.setdefault(f"{row.node} {place(row.choice)}: instead of {', '.join(row.goes)}.", []).append(row.quant)
    told = [f"{', '.join(quants)} on {sentence}" for sentence, quants in notes.items()]
    for host in dict.fromkeys(row.node for row in rows):
        never = [row for row in rows if row.node == host and row.answer == "no"]
        if never:
            close = min(never, key=lambda row: row.short)
            what = "its main memory" if close.where == report.HOST else close.where
            told.append(
                f"{host}: no room for {', '.join(row.quant for row in never)}, even with nothing else there; "
                f"{close.quant} lacks {close.short} MiB in {what}."
            )
    return told


def verdict(asked: dict[str, Any], rows: list[Row]) -> str:
    """Return the answer in a sentence or two."""
    # The files come in the order of preference.
    good = {word: [row for row in rows if row.answer == word] for word in ("beside", "instead")}
    first = {word: min(found, key=lambda row: rank(row.choice)) for word, found in good.items() if found}
    told = []
    if "beside" in first:
        told.append(f"{asked['name']} fits beside what runs: {_best(first['beside'])}.")
    if "instead" in first and ("beside" not in first or rank(first["instead"].choice) < rank(first["beside"].choice)):
        made_way = ", ".join(one["name"] for one in first["instead"].gone)
        start = "Better still in" if told else f"{asked['name']} fits in"
        told.append(f"{start} place of {made_way}: {_best(first['instead'])}.")
    return " ".join(told) or f"{asked['name']} does not fit on any node."


def _best(row: Row) -> str:
    fetch = f"{progress.size(row.fetch)} to fetch" if row.fetch else "its files are there"
    longest = f", up to {row.longest}" if row.longest > row.choice.step.context else ""
    return f"{row.quant} on {row.node} {place(row.choice)} with {row.choice.step.context} tokens{longest}, {fetch}"
