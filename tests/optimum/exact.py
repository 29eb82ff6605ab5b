# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The best plan there is, by an exact solver (HiGHS), and whether a plan keeps the rules.

Every way in which a model may run is a yes or a no; nothing is left out beforehand, and nothing here is taken from the
planner's search. What a way takes and what it is worth comes from the same two tables that the planner uses: of memory
the quick number or the full prediction, whichever is more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import totals
from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import Choice, Ways, choices
from ansible_collections.homelab.inference.plugins.module_utils.planner.footprint import Footprints
from ansible_collections.homelab.inference.plugins.module_utils.planner.problem import Problem
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import Room
from fleets import Fleet

# What HiGHS may leave of the optimum, as a part of it.
GAP = 1e-6


@dataclass
class Way:
    """One way of one model on one node, and the number of its variable."""

    model: str
    host: str
    choice: Choice
    column: int


class Program:
    """The choice of a plan as an integer program."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.room = Room(fleet.nodes)
        self.rows: list[tuple[dict[int, float], float]] = []  # sum of coefficient x variable <= limit
        self.columns = 0
        self.whole: list[bool] = []
        self.ways: list[Way] = []
        self.free = self.room.free()
        footprints = Footprints()
        problem = Problem(fleet.models, fleet.resolved, fleet.nodes, [], False, Ways())
        for name, model in fleet.models.items():
            allowed = model["nodes"] or [
                host
                for host, node in fleet.nodes.items()
                if node["presence"] == "always" or model["replicas"] == "each"
            ]
            for host in allowed:
                for choice in choices(model, fleet.resolved[name], host, self.room, footprints):
                    # What a plan picks is predicted in full, and has to fit with that, too.
                    full = totals(problem.parts(name, choice))
                    most = {where: max(size, choice.memory.get(where, 0)) for where, size in full.items()}
                    needs = self.room.needs(host, {**choice.memory, **most})
                    if all(size <= self.free[number] for number, size in needs):
                        self.ways.append(Way(name, host, replace(choice, needs=needs), self.column(True)))
        for name, model in fleet.models.items():
            self.rules(name, model)
        self.memory()

    def column(self, whole: bool) -> int:
        """Add a variable, from 0 to 1 when it is whole."""
        self.columns += 1
        self.whole.append(whole)
        return self.columns - 1

    def rules(self, name: str, model: dict[str, Any]) -> None:
        """One server of a model on a node, as many as are wanted, of one file, and never on guests alone."""
        per_host: dict[str, list[Way]] = defaultdict(list)
        per_quant: dict[int, list[Way]] = defaultdict(list)
        for way in self.ways:
            if way.model == name:
                per_host[way.host].append(way)
                per_quant[way.choice.step.quant].append(way)
        for ways in per_host.values():
            self.rows.append(({way.column: 1.0 for way in ways}, 1.0))
        if model["replicas"] != "each":
            everywhere = [way for ways in per_host.values() for way in ways]
            self.rows.append(({way.column: 1.0 for way in everywhere}, float(model["replicas"])))
            home = {way.column: -1.0 for way in everywhere if self.fleet.nodes[way.host]["presence"] == "always"}
            for host, ways in per_host.items():
                if self.fleet.nodes[host]["presence"] != "always":
                    self.rows.append(({**home, **{way.column: 1.0 for way in ways}}, 0.0))
        if len(per_quant) > 1 and len(per_host) > 1:
            taken = {quant: self.column(True) for quant in per_quant}
            self.rows.append((dict.fromkeys(taken.values(), 1.0), 1.0))
            for quant, ways in per_quant.items():
                for host in per_host:
                    here = {way.column: 1.0 for way in ways if way.host == host}
                    self.rows.append(({**here, taken[quant]: -1.0}, 0.0))

    def memory(self) -> None:
        """No bin holds more than it has; those that take turns hold as much as the largest of them."""
        free = self.room.free()
        bins: list[dict[int, float]] = [{} for _size in free]
        largest: dict[Any, int] = {}
        turns: dict[Any, dict[int, float]] = defaultdict(dict)
        for way in self.ways:
            for number, size in way.choice.needs:
                if not way.choice.turns:
                    bins[number][way.column] = float(size)
                    continue
                group = (way.host, way.choice.place.devices, number)
                if group not in largest:
                    largest[group] = self.column(False)
                    bins[number][largest[group]] = 1.0
                turns[group, way.model][way.column] = float(size)
        for (group, _model), needs in turns.items():
            self.rows.append(({**needs, largest[group]: -1.0}, 0.0))
        for number, needs in enumerate(bins):
            if needs:
                self.rows.append((needs, float(free[number])))

    def solve(self, gains: dict[int, float], floor: dict[int, float] | None = None, least: float = 0.0) -> float:
        """Return the most that the sum of gains can be, where the sum of C(floor) is C(least) or more."""
        rows = [*self.rows, *([({column: -gain for column, gain in floor.items()}, -least)] if floor else [])]
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("mip_rel_gap", GAP)
        problem = highspy.HighsLp()
        problem.num_col_, problem.num_row_ = self.columns, len(rows)
        cost = numpy.zeros(self.columns)
        for column, gain in gains.items():
            cost[column] = -gain
        problem.col_cost_ = cost
        problem.col_lower_ = numpy.zeros(self.columns)
        problem.col_upper_ = numpy.array([1.0 if whole else highspy.kHighsInf for whole in self.whole])
        problem.integrality_ = [
            highspy.HighsVarType.kInteger if whole else highspy.HighsVarType.kContinuous for whole in self.whole
        ]
        problem.row_lower_ = numpy.full(len(rows), -highspy.kHighsInf)
        problem.row_upper_ = numpy.array([limit for _needs, limit in rows])
        problem.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        starts, index, value = [0], [], []
        for needs, _limit in rows:
            index += list(needs)
            value += list(needs.values())
            starts.append(len(index))
        problem.a_matrix_.start_ = numpy.array(starts)
        problem.a_matrix_.index_ = numpy.array(index)
        problem.a_matrix_.value_ = numpy.array(value, dtype=float)
        highs.passModel(problem)
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"HiGHS ended with {highs.getModelStatus()}")
        self.answer = list(highs.getSolution().col_value)
        return -highs.getInfo().objective_function_value

    def value(self) -> dict[int, float]:
        """Return what each way is worth."""
        return {way.column: self.fleet.models[way.model]["priority"] * way.choice.quality for way in self.ways}

    def best(self) -> float:
        """Return the value of the best plan."""
        return self.solve(self.value()) if self.ways else 0.0

    def least_moves(self, previous: list[dict[str, Any]], value: float) -> int:
        """Return how many servers of the plan before have to go elsewhere in any plan of at least that value."""
        stays = {
            way.column: 1.0
            for way in self.ways
            for one in previous
            if (one["model"], one["node"], tuple(one["devices"])) == (way.model, way.host, way.choice.place.devices)
        }
        known = [one for one in previous if one["model"] in self.fleet.models]
        if not stays:
            return len(known)
        return len(known) - round(self.solve(stays, self.value(), value - GAP * max(value, 1.0)))


def moves(previous: list[dict[str, Any]], now: list[dict[str, Any]], models: dict[str, Any]) -> int:
    """Return how many servers of the plan before are not where they were."""
    there = {(one["model"], one["node"], tuple(one["devices"])) for one in now}
    return sum(
        one["model"] in models and (one["model"], one["node"], tuple(one["devices"])) not in there for one in previous
    )


def broken(fleet: Fleet, plan: dict[str, Any]) -> list[str]:
    """Return the rules that a plan breaks, from its numbers alone."""
    found = []
    room = Room(fleet.nodes)
    taken = [0] * len(room.names)
    groups: dict[Any, dict[int, int]] = {}
    for one in plan["instances"]:
        needs = room.needs(one["node"], one["memory"])
        if one["fit"] == "turns":
            held = groups.setdefault((one["node"], tuple(one["devices"])), {})
            for number, size in needs:
                held[number] = max(held.get(number, 0), size)
        else:
            for number, size in needs:
                taken[number] += size
    for held in groups.values():
        for number, size in held.items():
            taken[number] += size
    for number, (host, where) in enumerate(room.names):
        if taken[number] > room.free()[number]:
            found.append(f"{where} of {host} holds {taken[number]} of {room.free()[number]} MiB")
    for name, model in fleet.models.items():
        own = [one for one in plan["instances"] if one["model"] == name]
        hosts = [one["node"] for one in own]
        if len(set(hosts)) < len(hosts):
            found.append(f"{name} is twice on one node")
        if len({one["variant"] for one in own}) > 1:
            found.append(f"{name} has two files")
        if any(host not in (model["nodes"] or fleet.nodes) for host in hosts):
            found.append(f"{name} is where it may not be")
        if own and model["replicas"] != "each" and all(fleet.nodes[host]["presence"] == "guest" for host in hosts):
            found.append(f"{name} lives on guests alone")
        refused = any(entry["model"] == name for entry in plan["refused"])
        if model["replicas"] != "each" and (len(own) < model["replicas"]) != refused:
            found.append(f"{name} has {len(own)} of {model['replicas']} servers, refused: {refused}")
    return found
