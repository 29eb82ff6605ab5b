# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which model runs where, with which flags. Pure: the same facts give the same plan.

Each model's lists say how it may run (planner/choices.py), one table says what that is worth (planner/quality.py), and
the search picks for all models together what is worth most (planner/problem.py, planner/search.py). What the plan in
force has stays where it is unless moving it wins more than a move costs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import totals
from ansible_collections.homelab.inference.plugins.module_utils.planner import explain
from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import Ways, choices, variants
from ansible_collections.homelab.inference.plugins.module_utils.planner.files import in_place
from ansible_collections.homelab.inference.plugins.module_utils.planner.problem import Problem
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import steady
from ansible_collections.homelab.inference.plugins.module_utils.planner.search import Item, Option, Search
from ansible_collections.homelab.inference.plugins.module_utils.planner.start import order
from ansible_collections.homelab.inference.plugins.module_utils.planner.survival import survival

FIRST_PORT = 8080
# Raised when the same facts may get another plan from a newer version.
METHOD = 2
# What a lock keeps of a plan.
KEPT = ("instances", "refused", "devices", "survival", "order", "value", "nodes")


def plan(
    models: dict[str, dict[str, Any]],
    resolved: dict[str, dict[str, Any]],
    nodes: dict[str, dict[str, Any]],
    previous: list[dict[str, Any]],
    unresolved: dict[str, str] | None = None,
    recovery: bool = False,
    previous_nodes: dict[str, dict[str, Any]] | None = None,
    in_force: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return C({instances, refused, waiting, devices, survival, order, value, nodes, inputs}).

    :param models: the registry in normal form, in the order in which models are served (lab.models).
    :param resolved: per model C({files: [{name, size, sha256}], shape}), or C(variants), a list of these in order of
        preference; a model without an entry is refused.
    :param nodes: per inference node C({devices, memory_mib, presence, library, ports, reservations}), sizes in MiB.
    :param previous: the instances of the plan in force.
    :param unresolved: per model without files the reason why.
    :param recovery: refuse nothing: keep by priority what fits, and say what waits for what.
    :param previous_nodes: the C(nodes) that the plan in force was made from; figures that hardly moved since stay.
    :param in_force: the whole plan in force. Where it was made from the same facts it is returned: a search that goes
        on where an earlier one stopped might find something better, and servers would move though nothing happened.
    """
    nodes = steady(nodes, previous_nodes or {})
    # Why a source did not answer is no fact where the lock stood in for it.
    reasons = {name: reason for name, reason in (unresolved or {}).items() if name not in resolved}
    inputs = _digest([METHOD, models, resolved, nodes, reasons, recovery])
    if in_force and in_force.get("inputs") == inputs:
        return {"waiting": [], **{key: in_force[key] for key in (*KEPT, "inputs")}}
    problem = Problem(models, resolved, nodes, previous, recovery, Ways())
    search = problem.solve()
    instances = write(problem, search)
    refused = _refusals(problem, search, instances, unresolved or {})
    starts = order(instances, problem.previous, problem.room)
    value = sum(models[one["model"]]["priority"] * one["quality"] for one in instances)
    return {
        "instances": instances,
        "refused": [] if recovery else refused,
        "waiting": [explain.waits(one, previous, nodes) for one in refused] if recovery else [],
        "devices": problem.room.left(_planned(instances, problem)),
        "survival": survival(instances, nodes, problem.fallbacks),
        "order": starts,
        "value": round(value, 6),
        "nodes": nodes,
        "inputs": inputs,
    }


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write(problem: Problem, search: Search) -> list[dict[str, Any]]:
    """Return the servers, in the order of the registry."""
    names = _Names(problem.previous)
    instances = []
    groups: dict[Any, list[dict[str, Any]]] = {}
    for item, option in _in_order(problem, search):
        model = problem.models[item.model]
        choice = problem.choices[item.model][option.number]
        place = choice.place
        variant = variants(problem.resolved[item.model])[choice.step.quant]
        taken = problem.parts(item.model, choice)
        instance = {
            "name": names.take(item.model, place.host),
            "model": item.model,
            "mode": model["mode"],
            "node": place.host,
            "backend": problem.devices(choice)[1],
            "devices": list(place.devices),
            "port": None,
            "server_options": problem.options(model, choice),
            "memory": totals(taken),
            "parts": taken,
            "library": in_place(variant["files"], problem.nodes[place.host]["library"]),
            "quant": variant.get("quant") or variant["shape"].get("quant"),
            "variant": choice.step.quant,
            "start": 0,
            "stop_first": [],
            "fit": "turns" if choice.turns else place.fit,
            "quality": choice.quality,
            "turns": [],
        }
        instances.append(instance)
        if option.group:
            groups.setdefault(option.group, []).append(instance)
    for members in groups.values():
        for one in members:
            one["turns"] = [other["name"] for other in members if other is not one]
    _stage_once(instances)
    _ports(instances, problem)
    return instances


def _stage_once(instances: list[dict[str, Any]]) -> None:
    """Leave the room to load into a device with the server that needs most of it: they start one after the other."""
    needing: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for instance in instances:
        for part in instance["parts"]:
            # Those that take turns load whenever they are asked.
            if part["kind"] == "staging" and not instance["turns"]:
                needing.setdefault((instance["node"], part["where"]), []).append((part["bytes"], instance))
    for (_node, where), found in needing.items():
        found.sort(key=lambda one: -one[0])
        for _bytes, instance in found[1:]:
            instance["parts"] = [
                part for part in instance["parts"] if (part["kind"], part["where"]) != ("staging", where)
            ]
            instance["memory"] = totals(instance["parts"])


def _in_order(problem: Problem, search: Search) -> list[tuple[Item, Option]]:
    """Return what is placed in the order of the registry; of one model first those that run now, as they stand."""
    models, hosts = list(problem.models), list(problem.nodes)
    before = [(one["model"], one["node"]) for one in problem.previous]

    def rank(pair: tuple[Item, Option]) -> tuple[int, int, int]:
        where = (pair[0].model, pair[1].host)
        return models.index(where[0]), before.index(where) if where in before else len(before), hosts.index(where[1])

    return sorted(((item, option) for item, option in zip(search.items, search.answer) if option), key=rank)


class _Names:
    """Names of servers that will stay are kept for them; new ones take others."""

    def __init__(self, previous: list[dict[str, Any]]) -> None:
        self.previous = previous
        self.names = {one["name"] for one in previous}
        self.kept: set[str] = set()

    def take(self, model: str, host: str) -> str:
        """Return the server's name: the one it had on this node, else the model's name, numbered from the second on."""
        for instance in self.previous:
            if instance["model"] == model and instance["node"] == host and instance["name"] not in self.kept:
                self.kept.add(instance["name"])
                return instance["name"]
        numbered = (model if number == 1 else f"{model}-{number}" for number in itertools.count(1))
        name = next(name for name in numbered if name not in self.names)
        self.names.add(name)
        return name


def server_name(instance: dict[str, Any]) -> str:
    """Return the name of the server that runs a model; models that take turns share one, named after one of them."""
    return min([instance["name"], *(instance.get("turns") or [])])


def servers(instances: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the models of each server: one, or several that take turns."""
    found: dict[str, list[dict[str, Any]]] = {}
    for instance in instances:
        found.setdefault(server_name(instance), []).append(instance)
    return list(found.values())


def _ports(instances: list[dict[str, Any]], problem: Problem) -> None:
    """Give every server its port: the declared one, the one it had, else the first free one.

    Models that take turns are behind one port, that of the first of them that has one.
    """
    # Of models that took turns the one keeps the port that their server was named after.
    had = {(one["name"], one["node"]): one["port"] for one in problem.previous if one["name"] == server_name(one)}
    taken = {host: set(node.get("ports", [])) for host, node in problem.nodes.items()}
    without = []
    for members in servers(instances):
        host = members[0]["node"]
        wishes = [problem.models[one["model"]]["port"] for one in members]
        wishes += [had.get((one["name"], host)) for one in members]
        port = next((port for port in wishes if port and port not in taken[host]), None)
        if port:
            _listen(members, port, taken)
        else:
            without.append(members)
    for members in without:
        there = taken[members[0]["node"]]
        _listen(members, next(port for port in itertools.count(FIRST_PORT) if port not in there), taken)


def _listen(members: list[dict[str, Any]], port: int, taken: dict[str, set[int]]) -> None:
    taken[members[0]["node"]].add(port)
    for one in members:
        one["port"] = port


def _planned(instances: list[dict[str, Any]], problem: Problem) -> list[int]:
    """Return what the servers take of each bin; of models that take turns the largest counts."""
    room = problem.room
    taken = [0] * len(room.names)
    for members in servers(instances):
        held: dict[int, int] = {}
        for one in members:
            for number, size in room.needs(one["node"], one["memory"]):
                held[number] = max(held.get(number, 0), size)
        for number, size in held.items():
            taken[number] += size
    return taken


def _refusals(
    problem: Problem, search: Search, instances: list[dict[str, Any]], unresolved: dict[str, str]
) -> list[dict[str, Any]]:
    """Return why models have no place, or not as many as they want."""
    found = []
    for name, model in problem.models.items():
        if name not in problem.resolved:
            found.append(explain.without_numbers(name, unresolved.get(name, "its files are not known")))
            continue
        homes = problem.homes(model)
        if not homes:
            silent = [host for host in model["nodes"] or [] if host not in problem.nodes]
            reason = (
                f"{', '.join(silent)} did not answer and declares no hardware"
                if silent
                else "no node that may run it is left"
            )
            found.append(explain.without_numbers(name, reason))
        elif any(item.model == name and option is None for item, option in zip(search.items, search.answer)):
            found.append(_refusal(problem, search, instances, model, homes))
    return found


def _refusal(
    problem: Problem, search: Search, instances: list[dict[str, Any]], model: dict[str, Any], homes: list[str]
) -> dict[str, Any]:
    """Return the refusal of one model, with the cheapest change that was tried and helps."""
    name = model["name"]
    resolved = problem.resolved[name]
    taken = {one["node"] for one in instances if one["model"] == name}
    files = {one["variant"] for one in instances if one["model"] == name}
    found = [
        choice
        for host in homes
        if host not in taken
        for choice in choices(model, resolved, host, problem.room, problem.ways.footprints, False, all_of_them=True)
        if not files or choice.step.quant in files
    ]
    refused = explain.refusal(name, found, problem.room, search.free)
    if problem.recovery:
        return refused
    for change, changed, nodes in explain.changes(model, resolved, problem.nodes, refused):
        models = {**problem.models, name: changed or model}
        other = Problem(models, problem.resolved, nodes or problem.nodes, instances, False, problem.ways)
        if other.has_room(search, name) or (problem.fine and _helps(other, search, instances, name)):
            refused["change"] = change
            break
    return refused


def _helps(other: Problem, search: Search, instances: list[dict[str, Any]], name: str) -> bool:
    """Say whether a changed problem has a plan with all servers of a model, and no other server less."""
    after, model = _servers(other.with_others_in_place(instances, name)), other.models[name]
    wanted = len(other.homes(model)) if model["replicas"] == "each" else model["replicas"]
    return after.get(name, 0) >= wanted and all(
        after.get(one, 0) >= count for one, count in _servers(search).items() if one != name
    )


def _servers(search: Search) -> dict[str, int]:
    found: dict[str, int] = {}
    for item, option in zip(search.items, search.answer):
        if option is not None:
            found[item.model] = found.get(item.model, 0) + 1
    return found
