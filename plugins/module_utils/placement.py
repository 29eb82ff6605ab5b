# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which model runs where, with which flags. Pure: the same facts give the same plan.

Each model's lists say how it may run (planner/choices.py), one table says what that is worth (planner/quality.py), and
the search picks for all models together what is worth most (planner/search.py). What the plan in force has stays where
it is unless moving it is worth more than MOVE.
"""

from __future__ import annotations

import itertools
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.planner import explain
from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import (
    Choice,
    choices,
    server_options,
    undominated,
    variants,
)
from ansible_collections.homelab.inference.plugins.module_utils.planner.footprint import Footprints, parts
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import Room, backend, steady
from ansible_collections.homelab.inference.plugins.module_utils.planner.search import Item, Option, Search
from ansible_collections.homelab.inference.plugins.module_utils.planner.start import order
from ansible_collections.homelab.inference.plugins.module_utils.planner.survival import survival

FIRST_PORT = 8080
# What a server has to win by moving, as a part of the registry's mean priority.
MOVE = 0.01
# Scores are whole numbers, so that they add up to the same on every machine: millionths of value, and below them, in
# this order, what decides between plans of equal value.
VALUE = 10**6
TIES = 10**14
SAME_OPTIONS, LIKED_NODE, FILE_THERE, APART, FEW_DEVICES = 10**11, 10**9, 10**6, 10**3, 1


class Planner:
    """Makes one plan."""

    def __init__(
        self,
        models: dict[str, dict[str, Any]],
        resolved: dict[str, dict[str, Any]],
        nodes: dict[str, dict[str, Any]],
        previous: list[dict[str, Any]],
        recovery: bool,
        footprints: Footprints,
    ) -> None:
        self.models = models
        self.resolved = resolved
        self.nodes = nodes
        self.previous = [one for one in previous if one["model"] in models]
        self.recovery = recovery
        self.footprints = footprints
        self.room = Room(nodes)
        self.placeable = [name for name in models if name in resolved]
        self.fallbacks = fallbacks(models)
        self.choices: dict[str, list[Choice]] = {}
        # Names of servers that will stay are kept for them; new ones take others.
        self.names = {one["name"] for one in self.previous}
        self.kept: set[str] = set()

    def homes(self, model: dict[str, Any]) -> list[str]:
        """Return the nodes on which a model may run, in the order of preference."""
        allowed = [host for host in model["nodes"] or self.nodes if host in self.nodes]
        if model["nodes"] is None and model["replicas"] != "each":
            allowed = [host for host in allowed if self.nodes[host]["presence"] == "always"]
        return allowed

    # --- what the search is asked ----------------------------------------------------------------------------------

    def items(self) -> list[Item]:
        """Return one item for each server that is wanted."""
        priorities = [self.models[name]["priority"] for name in self.placeable]
        stay = int(MOVE * VALUE * sum(priorities) / max(len(priorities), 1)) * TIES
        found = []
        for unit, name in enumerate(self.placeable):
            model = self.models[name]
            homes = self.homes(model)
            per_host = {}
            self.choices[name] = []
            for rank, host in enumerate(homes):
                good = undominated(list(choices(model, self.resolved[name], host, self.room, self.footprints)))
                start = len(self.choices[name])
                self.choices[name] += good
                per_host[host] = [
                    self.option(model, start + number, choice, len(homes) - rank, stay)
                    for number, choice in enumerate(good)
                ]
            apart = frozenset(
                other
                for other in self.placeable
                if other in self.fallbacks.get(name, []) or name in self.fallbacks.get(other, [])
            )
            if model["replicas"] == "each":
                # Where there is one file only, they do not depend on each other.
                alone = len(variants(self.resolved[name])) == 1
                found += [
                    Item(name, True, unit * 1000 + (number if alone else 0), per_host[host], apart)
                    for number, host in enumerate(homes)
                ]
                continue
            for number in range(model["replicas"]):
                options = [
                    option
                    for host in homes
                    # A guest is never the only home.
                    if number or self.nodes[host]["presence"] == "always"
                    for option in per_host[host]
                ]
                found.append(Item(name, number == 0, unit * 1000, options, apart))
        if self.recovery:
            self.prefer_presence(found)
        return found

    def option(self, model: dict[str, Any], number: int, choice: Choice, liking: int, stay: int) -> Option:
        """Return a choice with its score."""
        place = choice.place
        score = (round(model["priority"] * choice.quality * VALUE) + 1) * TIES
        before = self.before(model["name"], place.host)
        if before and tuple(before["devices"]) == place.devices:
            score += stay
            if before["server_options"] == self.options(model, choice):
                score += SAME_OPTIONS
        if model["nodes"] is not None:
            score += LIKED_NODE * liking
        variant = variants(self.resolved[model["name"]])[choice.step.quant]
        if in_place(variant["files"], self.nodes[place.host]["library"]):
            score += FILE_THERE
        score -= FEW_DEVICES * len(place.devices)
        group = (place.host, place.devices) if choice.turns else None
        return Option(score, place.host, choice.needs, group, number, choice.step.quant, bool(place.devices))

    def prefer_presence(self, items: list[Item]) -> None:
        """Make being there worth more than all that servers of lower priority can bring together."""
        for priority in sorted({self.models[item.model]["priority"] for item in items}):
            below = sum(item.best for item in items if self.models[item.model]["priority"] < priority)
            for item in items:
                if self.models[item.model]["priority"] == priority:
                    for option in item.options:
                        option.score += below
                    item.best = item.options[0].score if item.options else 0

    def before(self, name: str, host: str) -> dict[str, Any] | None:
        """Return the server of a model that the plan in force has on a node."""
        return next((one for one in self.previous if one["model"] == name and one["node"] == host), None)

    def options(self, model: dict[str, Any], choice: Choice) -> dict[str, Any]:
        """Return the llama-server options of a choice."""
        variant = variants(self.resolved[model["name"]])[choice.step.quant]
        return server_options(model, choice.step, choice.place, variant["shape"])

    def incumbent(self, items: list[Item]) -> list[Option | None]:
        """Return for each item the option that is like what runs now, if there is one."""
        left = {id(one): one for one in self.previous}
        found: list[Option | None] = []
        for item in items:
            kept = None
            for option in item.options:
                place = self.choices[item.model][option.number].place
                one = self.before(item.model, option.host)
                if one and id(one) in left and tuple(one["devices"]) == place.devices:
                    kept = option
                    del left[id(one)]
                    break
            found.append(kept)
        return found

    def search(self) -> Search:
        """Return the search with its answer: the better of one from what runs now, and one from nothing."""
        items = self.items()
        kinds = self.kinds()
        grain = TIES
        best: Search | None = None
        for start in [self.incumbent(items), [None] * len(items)] if self.previous else [[None] * len(items)]:
            one = Search(items, self.room.free(), kinds, APART, grain)
            one.run(start)
            if best is None or one.total() > best.total():
                best = one
        return best

    def kinds(self) -> list[int]:
        """Return per bin a number; bins with the same number are alike for every model."""
        held = {(one["node"], where) for one in self.previous for where in one["devices"]}
        seen: dict[Any, int] = {}
        found = []
        for number, (host, where) in enumerate(self.room.names):
            card = next((device for device in self.nodes[host]["devices"] if device["id"] == where), None)
            if card is None or (host, where) in held:
                kind: Any = number
            else:
                kind = (
                    host,
                    *(card.get(name) for name in ("vendor", "memory_kind", "architecture", "memory_mib", "cap_mib")),
                )
            found.append(seen.setdefault(kind, len(seen)))
        return found

    # --- what comes of it ------------------------------------------------------------------------------------------

    def write(self, search: Search) -> list[dict[str, Any]]:
        """Return the servers, in the order of the registry."""
        instances = []
        groups: dict[Any, list[dict[str, Any]]] = {}
        for item, option in zip(search.items, search.answer):
            if option is None:
                continue
            model = self.models[item.model]
            choice = self.choices[item.model][option.number]
            place = choice.place
            own = {device["id"]: device for device in self.nodes[place.host]["devices"]}
            devices = [own[name] for name in place.devices]
            variant = variants(self.resolved[item.model])[choice.step.quant]
            engine = backend(devices[0]) if devices else "cpu"
            options = self.options(model, choice)
            instance = {
                "name": self.name(item.model, place.host),
                "model": item.model,
                "mode": model["mode"],
                "node": place.host,
                "backend": engine,
                "devices": list(place.devices),
                "port": None,
                "server_options": options,
                "memory": {where: size for where, size in choice.memory.items() if size},
                "parts": parts(variant, options, devices, engine),
                "library": in_place(variant["files"], self.nodes[place.host]["library"]),
                "quant": variant.get("quant") or variant["shape"].get("quant"),
                "variant": choice.step.quant,
                "start": 0,
                "fit": "turns" if choice.turns else place.fit,
                "quality": choice.quality,
                "turns": [],
                "stop_first": [],
            }
            instances.append(instance)
            if option.group:
                groups.setdefault(option.group, []).append(instance)
        for members in groups.values():
            for one in members:
                one["turns"] = [other["name"] for other in members if other is not one]
        return instances

    def name(self, model: str, host: str) -> str:
        """Return the server's name: the one it had on this node, else the model's name, numbered from the second on."""
        for instance in self.previous:
            if instance["model"] == model and instance["node"] == host and instance["name"] not in self.kept:
                self.kept.add(instance["name"])
                return instance["name"]
        numbered = (model if number == 1 else f"{model}-{number}" for number in itertools.count(1))
        name = next(name for name in numbered if name not in self.names)
        self.names.add(name)
        return name

    def ports(self, instances: list[dict[str, Any]]) -> None:
        """Give every server its port: the declared one, the one it had, else the first free one."""
        had = {(instance["name"], instance["node"]): instance["port"] for instance in self.previous}
        taken = {host: set(node.get("ports", [])) for host, node in self.nodes.items()}
        for instance in instances:
            port = self.models[instance["model"]]["port"] or had.get((instance["name"], instance["node"]))
            if port and port not in taken[instance["node"]]:
                instance["port"] = port
                taken[instance["node"]].add(port)
        for instance in instances:
            if instance["port"] is None:
                instance["port"] = next(
                    port for port in itertools.count(FIRST_PORT) if port not in taken[instance["node"]]
                )
                taken[instance["node"]].add(instance["port"])


def fallbacks(models: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return per model those that answer in its place: the declared ones, else the later ones of its categories."""
    found = {}
    names = list(models)
    for number, name in enumerate(names):
        model = models[name]
        if model["fallbacks"] is not None:
            found[name] = [other for other in model["fallbacks"] if other in models]
        elif model["mode"] != "embedding":
            own = set(model["categories"])
            found[name] = [other for other in names[number + 1 :] if own & set(models[other]["categories"])]
    return found


def in_place(files: list[dict[str, Any]], library: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return C({library, path}) of the first file where all files of a model lie in one library of a node, else None.

    A file counts as the same when name and size agree, and the digests where both are known.
    """
    for directory in dict.fromkeys(entry["library"] for entry in library):
        own: dict[str, dict[str, Any]] = {}
        for entry in library:
            if entry["library"] == directory:
                for file in entry["shards"] or [entry]:
                    own.setdefault(file["name"], file)
        found = [own.get(file["name"].rsplit("/", 1)[-1]) for file in files]
        if found and all(entry and _same(file, entry) for file, entry in zip(files, found)):
            return {"library": directory, "path": found[0]["path"]}
    return None


def _same(file: dict[str, Any], entry: dict[str, Any]) -> bool:
    both = file.get("sha256"), entry.get("sha256")
    return file["size"] == entry["size"] and (None in both or both[0] == both[1])


def plan(
    models: dict[str, dict[str, Any]],
    resolved: dict[str, dict[str, Any]],
    nodes: dict[str, dict[str, Any]],
    previous: list[dict[str, Any]],
    unresolved: dict[str, str] | None = None,
    recovery: bool = False,
    previous_nodes: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return C({instances, refused, waiting, devices, survival, order, value, nodes}).

    :param models: the registry in normal form, in the order in which models are served (lab.models).
    :param resolved: per model C({files: [{name, size, sha256}], shape}), or C(variants), a list of these in order of
        preference; a model without an entry is refused.
    :param nodes: per inference node C({devices, memory_mib, presence, library, ports, reservations}), sizes in MiB.
    :param previous: the instances of the plan in force.
    :param unresolved: per model without files the reason why.
    :param recovery: refuse nothing: keep by priority what fits, and say what waits for what.
    :param previous_nodes: the C(nodes) that the plan in force was made from; figures that hardly moved since stay.
    """
    nodes = steady(nodes, previous_nodes or {})
    return _Plan(models, resolved, nodes, previous, unresolved or {}, recovery, Footprints()).make()


class _Plan:
    """One plan with all that is told of it."""

    def __init__(
        self,
        models: dict[str, dict[str, Any]],
        resolved: dict[str, dict[str, Any]],
        nodes: dict[str, dict[str, Any]],
        previous: list[dict[str, Any]],
        unresolved: dict[str, str],
        recovery: bool,
        footprints: Footprints,
    ) -> None:
        self.inputs = (models, resolved, nodes)
        self.previous = previous
        self.unresolved = unresolved
        self.recovery = recovery
        self.footprints = footprints

    def make(self) -> dict[str, Any]:
        """Plan, and explain."""
        models, resolved, nodes = self.inputs
        planner = Planner(models, resolved, nodes, self.previous, self.recovery, self.footprints)
        search = planner.search()
        instances = planner.write(search)
        planner.ports(instances)
        refused = self.refusals(planner, search)
        starts = order(instances, planner.previous, planner.room)
        free = planner.room.free()
        planned = [before - now for before, now in zip(free, search.free)]
        value = sum(models[one["model"]]["priority"] * one["quality"] for one in instances)
        return {
            "instances": instances,
            "refused": [] if self.recovery else refused,
            "waiting": [waits(one, self.previous, nodes) for one in refused] if self.recovery else [],
            "devices": planner.room.left(planned),
            "survival": survival(instances, nodes, planner.fallbacks),
            "order": starts,
            "value": round(value, 6),
            "nodes": nodes,
        }

    def refusals(self, planner: Planner, search: Search) -> list[dict[str, Any]]:
        """Return why models have no place, or not as many as they want."""
        models, resolved, nodes = self.inputs
        found = []
        for name, model in models.items():
            if name not in resolved:
                reason = self.unresolved.get(name, "its files are not known")
                found.append(explain.without_numbers(name, reason))
                continue
            homes = planner.homes(model)
            missing = [
                item for item, option in zip(search.items, search.answer) if item.model == name and option is None
            ]
            if not homes:
                silent = [host for host in model["nodes"] or [] if host not in nodes]
                reason = (
                    f"{', '.join(silent)} did not answer and declares no hardware"
                    if silent
                    else "no node that may run it is left"
                )
                found.append(explain.without_numbers(name, reason))
            elif missing:
                found.append(self.refusal(planner, search, model, homes))
        return found

    def refusal(self, planner: Planner, search: Search, model: dict[str, Any], homes: list[str]) -> dict[str, Any]:
        """Return the refusal of one model, with the cheapest change that was tried and helps."""
        models, resolved, nodes = self.inputs
        name = model["name"]
        taken = {option.host for item, option in zip(search.items, search.answer) if option and item.model == name}
        left = [host for host in homes if host not in taken]
        ways = [
            choice
            for host in left
            for choice in choices(model, resolved[name], host, planner.room, self.footprints, all_of_them=True)
        ]
        refused = explain.refusal(name, ways, planner.room, search.free)
        if self.recovery:
            return refused
        placed = _servers(search)
        for change, changed, other_nodes in explain.changes(model, resolved[name], nodes, refused):
            after = Planner(
                {**models, name: changed or model},
                resolved,
                other_nodes or nodes,
                [*self.previous, *planner.write(search)] if not self.previous else self.previous,
                False,
                self.footprints,
            ).search()
            now = _servers(after)
            wanted = sum(item.model == name for item in after.items)
            if now.get(name, 0) >= wanted and all(
                now.get(other, 0) >= count for other, count in placed.items() if other != name
            ):
                refused["change"] = change
                break
        return refused


def _servers(search: Search) -> dict[str, int]:
    found: dict[str, int] = {}
    for item, option in zip(search.items, search.answer):
        if option is not None:
            found[item.model] = found.get(item.model, 0) + 1
    return found


def waits(refused: dict[str, Any], previous: list[dict[str, Any]], nodes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return for what a model waits: the node or card that it ran on, else memory."""
    name = refused["model"]
    for one in previous:
        if one["model"] != name:
            continue
        if one["node"] not in nodes:
            return {"model": name, "for": one["node"], "sentence": f"{name} waits for {one['node']} to come back."}
        there = {device["id"] for device in nodes[one["node"]]["devices"]}
        gone = [device for device in one["devices"] if device not in there]
        if gone:
            what = f"{gone[0]} of {one['node']}"
            return {
                "model": name,
                "for": f"{one['node']} {gone[0]}",
                "sentence": f"{name} waits for {what} to come back.",
            }
    where = f"{refused['node']} {refused['device']}" if refused["node"] else None
    return {"model": name, "for": where, "sentence": f"{name} waits: {refused['reason']}."}
