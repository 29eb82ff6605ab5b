# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a registry and a lab to what the search is asked, and back: which way each server runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import totals
from ansible_collections.homelab.inference.plugins.module_utils.planner.choices import (
    ROUTER_MIB,
    Choice,
    Place,
    Step,
    Ways,
    at,
    places,
    server_options,
    stairs,
    variants,
    widest_options,
)
from ansible_collections.homelab.inference.plugins.module_utils.planner.files import in_place
from ansible_collections.homelab.inference.plugins.module_utils.planner.footprint import CLASS, MIB, parts
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import HOST, Room, backend
from ansible_collections.homelab.inference.plugins.module_utils.planner.search import WHOLE_ITEMS, Item, Option, Search

# What a server has to win by moving, as a part of the registry's mean priority.
MOVE = 0.01
# What a plan has to win to take the place of the one in force, as a part of its value. In a large lab the search is not
# exhaustive, and would find something each time.
WORTH_IT, WORTH_IT_LARGE = 0.01, 0.05
# Up to so many models times GPUs and nodes every step of every model is looked at.
FINE = 150
# Scores are whole numbers, so that they add up to the same on every machine: millionths of value, and below them, in
# this order, what decides between plans of equal value.
VALUE = 10**6
TIES = 10**14
SAME_OPTIONS, LIKED_NODE, FILE_THERE, APART, FEW_DEVICES = 10**11, 10**9, 10**6, 10**3, 1
# How often a plan is made again because a full prediction is above the quick one.
CORRECTIONS = 6


class Problem:
    """A registry on a lab, with the plan in force."""

    def __init__(
        self,
        models: dict[str, dict[str, Any]],
        resolved: dict[str, dict[str, Any]],
        nodes: dict[str, dict[str, Any]],
        previous: list[dict[str, Any]],
        recovery: bool,
        ways: Ways,
    ) -> None:
        self.models = models
        self.resolved = resolved
        self.nodes = nodes
        self.previous = [one for one in previous if one["model"] in models]
        self.recovery = recovery
        self.ways = ways
        self.room = Room(nodes)
        self.placeable = [name for name in models if name in resolved]
        self.fallbacks = fallbacks(models)
        self.fine = len(self.placeable) * len(self.room.names) <= FINE
        self.choices: dict[str, list[Choice]] = {}
        self._before = {(one["model"], one["node"]): one for one in reversed(self.previous)}
        self._kinds = self._alike()

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
            per_host: dict[str, list[Option]] = {}
            self.choices[name] = []
            for rank, host in enumerate(homes):
                good = self._ways(model, host)
                start = len(self.choices[name])
                self.choices[name] += good
                liking = len(homes) - rank if model["nodes"] is not None else 0
                per_host[host] = self._options(model, host, good, start, liking, stay)
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
            self._prefer_presence(found)
        return found

    def _ways(self, model: dict[str, Any], host: str) -> list[Choice]:
        """Return the ways of a model on a node, that of the server that runs there now among them."""
        resolved = self.resolved[model["name"]]
        good = self.ways.on(model, resolved, host, self.room, self.fine)
        now = self._before.get((model["name"], host))
        if not now or any(self._same(now, model, choice) for choice in good):
            return good
        shape = variants(resolved)[0]["shape"]
        there = [place for place in places(self.room, host, shape, self.fine) if list(place.devices) == now["devices"]]
        ladder = stairs(model, resolved, self.ways.footprints)
        same = [
            choice
            for place in there
            for choice in at(place, ladder, model, resolved, self.room, self.ways.footprints)
            if self._same(now, model, choice)
        ]
        return good + same

    def _options(
        self, model: dict[str, Any], host: str, good: list[Choice], start: int, liking: int, stay: int
    ) -> list[Option]:
        """Return the choices on a node with their scores."""
        before = self._before.get((model["name"], host))
        library = self.nodes[host]["library"]
        there = [bool(in_place(one["files"], library)) for one in variants(self.resolved[model["name"]])]
        found = []
        for number, choice in enumerate(good, start):
            place = choice.place
            score = _worth(model, choice) * TIES + LIKED_NODE * liking - FEW_DEVICES * len(place.devices)
            if there[choice.step.quant]:
                score += FILE_THERE
            if before and tuple(before["devices"]) == place.devices:
                score += stay
                if self._same(before, model, choice):
                    score += SAME_OPTIONS
            group = (host, place.devices) if choice.turns else None
            found.append(Option(score, host, choice.needs, group, number, choice.step.quant, bool(place.devices)))
        return found

    def _prefer_presence(self, items: list[Item]) -> None:
        """Make being there worth more than all that servers of lower priority can bring together."""
        for priority in sorted({self.models[item.model]["priority"] for item in items}):
            below = sum(item.best for item in items if self.models[item.model]["priority"] < priority)
            seen: set[int] = set()
            for item in items:
                if self.models[item.model]["priority"] != priority:
                    continue
                for option in item.options:
                    # Replicas share their options.
                    if id(option) not in seen:
                        seen.add(id(option))
                        option.score += below
                item.best = item.options[0].score if item.options else 0

    def options(self, model: dict[str, Any], choice: Choice) -> dict[str, Any]:
        """Return the llama-server options of a choice."""
        variant = variants(self.resolved[model["name"]])[choice.step.quant]
        return server_options(model, choice.step, choice.place, variant["shape"])

    def _same(self, one: dict[str, Any], model: dict[str, Any], choice: Choice) -> bool:
        """Say whether a choice is what a server of the plan in force runs with on its devices."""
        place = choice.place
        if (one["node"], tuple(one["devices"])) != (place.host, place.devices):
            return False
        variant = variants(self.resolved[model["name"]])[choice.step.quant]
        if one.get("quant") not in (None, variant.get("quant") or variant["shape"].get("quant")):
            return False
        if "fit" in one and (one["fit"] == "turns") != choice.turns:
            return False
        return bool(one["server_options"] == self.options(model, choice))

    def incumbent(self, items: list[Item], instances: list[dict[str, Any]]) -> list[Option | None]:
        """Return for each item the option that is like one of these servers, if there is one."""
        left = list(instances)
        found: list[Option | None] = []
        for item in items:
            best: Option | None = None
            mine = None
            for option in item.options:
                choice = self.choices[item.model][option.number]
                for one in left:
                    if (one["model"], one["node"], tuple(one["devices"])) != (
                        item.model,
                        option.host,
                        choice.place.devices,
                    ):
                        continue
                    same = self._same(one, self.models[item.model], choice)
                    if same or best is None:
                        best, mine = option, one
                    if same:
                        break
                else:
                    continue
                break
            if mine is not None:
                left.remove(mine)
            found.append(best)
        return found

    def _alike(self) -> list[int]:
        """Return per bin a number; bins with the same number are alike for every model."""
        held = {(one["node"], where) for one in self.previous for where in one["devices"]}
        seen: dict[Any, int] = {}
        found = []
        for number, (host, where) in enumerate(self.room.names):
            card = next((device for device in self.nodes[host]["devices"] if device["id"] == where), None)
            kind: Any = number
            if card is not None and (host, where) not in held:
                kind = (host, *(card.get(name) for name in CLASS))
            found.append(seen.setdefault(kind, len(seen)))
        return found

    # --- the answer ------------------------------------------------------------------------------------------------

    def solve(self) -> Search:
        """Return the search with its answer.

        What is in force stays, made better in place, unless another plan has a server more or is worth WORTH_IT more.
        """
        for _round in range(CORRECTIONS):
            items = self.items()
            best = self._searched(items)
            if self.previous:
                kept = self._kept(items)
                self._refine(kept)
                if not self._worth_it(kept, best):
                    best = kept
            if not self._corrected(best):
                break
        return best

    def _kept(self, items: list[Item]) -> Search:
        """Return a search with every server where it is.

        Where one has no room any more it goes elsewhere, or the others make room where they are if that is worth more.
        """
        before = self.incumbent(items, self.previous)
        kept = Search(items, self.room.free(), self._kinds, APART, TIES)
        kept.begin(before)
        if any(option is not None and option is not now for option, now in zip(before, kept.answer)):
            bound = [item if option is None else self._bound(item, option) for item, option in zip(items, before)]
            there = Search(bound, self.room.free(), self._kinds, APART, TIES)
            there.run(before)
            closer = Search(items, self.room.free(), self._kinds, APART, TIES)
            closer.begin(there.answer)
            kept = max(kept, closer, key=Search.total)
        return kept

    def _bound(self, item: Item, option: Option) -> Item:
        """Return a server that may run on the devices of C(option) alone."""
        choices = self.choices[item.model]
        place = choices[option.number].place
        return replace(
            item,
            options=[
                one
                for one in item.options
                if one.host == place.host and choices[one.number].place.devices == place.devices
            ],
        )

    def _worth_it(self, kept: Search, best: Search) -> bool:
        if sum(option is None for option in best.answer) < sum(option is None for option in kept.answer):
            return True
        return self._value(best) >= self._value(kept) * (1 + (WORTH_IT if self.fine else WORTH_IT_LARGE))

    def _value(self, search: Search) -> float:
        return sum(
            self.models[item.model]["priority"] * self.choices[item.model][option.number].quality
            for item, option in zip(search.items, search.answer)
            if option is not None
        )

    def has_room(self, search: Search, name: str) -> bool:
        """Say whether the missing servers of a model fit in beside all others of an answer, as it is."""
        model = self.models[name]
        more = [now - before for now, before in zip(self.room.free(), search.room)]
        missing = [
            number
            for number, (item, option) in enumerate(zip(search.items, search.answer))
            if item.model == name and option is None
        ]
        if model["replicas"] != "each":
            missing = missing[: model["replicas"] - sum(item.model == name for item in search.items) + len(missing)]
        resolved = self.resolved[name]
        ladder = stairs(model, resolved, self.ways.footprints)
        shape = variants(resolved)[0]["shape"]
        # Of each file the step that takes least.
        least = {step.quant: step for step in ladder}
        search.free = [free + size for free, size in zip(search.free, more)]
        known: dict[Step, tuple[list[int], int]] = {}
        ways = [
            Option(0, host, choice.needs, (host, place.devices) if choice.turns else None, 0, choice.step.quant)
            for host in self.homes(model)
            if "on-demand" in model["keep"] or self._might_hold(search, host, model, list(least.values()))
            for place in places(self.room, host, shape, self.fine)
            for choice in at(
                place, list(least.values()), model, resolved, self.room, self.ways.footprints, False, known
            )
        ]
        placed = []
        for number in missing:
            item = search.items[number]
            guests = item.first and model["replicas"] != "each"
            way = next(
                (
                    one
                    for one in ways
                    if search.fits(item, one) and not (guests and self.nodes[one.host]["presence"] != "always")
                ),
                None,
            )
            if way and search.allowed(number):
                search.place(number, way)
                placed.append(number)
        for number in placed:
            search.lift(number)
        search.free = [free - size for free, size in zip(search.free, more)]
        return len(placed) == len(missing)

    def _might_hold(self, search: Search, host: str, model: dict[str, Any], ladder: list[Step]) -> bool:
        """Say whether all that is free on a node together comes to the weights and caches of one of these steps."""
        free = sum(max(size, 0) for (home, _where), size in zip(self.room.names, search.free) if home == host)
        for step in ladder:
            shape = variants(self.resolved[model["name"]])[step.quant]["shape"]
            options = server_options(model, step, Place(host, (), "cpu"), shape)
            if self.ways.footprints.total(shape, options) <= free * MIB:
                return True
        return False

    def with_others_in_place(self, instances: list[dict[str, Any]], model: str) -> Search:
        """Return a search that begins with these servers, puts in what is missing, and moves things for one model."""
        items = self.items()
        search = Search(items, self.room.free(), self._kinds, APART, TIES)
        search.begin(self.incumbent(items, instances))
        if self.fine and any(item.model == model and not one for item, one in zip(items, search.answer)):
            search.make_way(model)
        return search

    def _searched(self, items: list[Item]) -> Search:
        """Return the best answer of those that began with what runs now, with nothing, and with each model in turn."""
        best: Search | None = None
        nothing: list[Option | None] = [None] * len(items)
        units = sorted({item.unit for item in items})
        starts: list[tuple[list[Option | None], int | None]] = []
        if self.previous:
            starts.append((self.incumbent(items, self.previous), None))
        starts.append((nothing, None))
        if len(items) <= WHOLE_ITEMS:
            starts += [(nothing, unit) for unit in units]
        elif self.fine:
            starts.append((nothing, units[-1]))
        else:
            # In a large lab the first is all that there is time for.
            del starts[1:]
        for start, unit in starts:
            search = Search(items, self.room.free(), self._kinds, APART, TIES)
            search.run(start, unit)
            self._refine(search)
            if best is None or search.total() > best.total():
                best = search
        best.exhaust()
        self._refine(best)
        return best

    def _refine(self, search: Search) -> None:
        """Take the best step for each server where it is: the search may have looked at a selection of them."""
        for number, item in enumerate(search.items):
            option = search.answer[number]
            if option is None:
                continue
            model, resolved = self.models[item.model], self.resolved[item.model]
            known = self.choices[item.model]
            old = known[option.number]
            search.lift(number)
            best = option
            ladder = stairs(model, resolved, self.ways.footprints)
            for choice in at(old.place, ladder, model, resolved, self.room, self.ways.footprints):
                if choice.turns != old.turns or choice.step.quant != old.step.quant:
                    continue
                more = (_worth(model, choice) - _worth(model, old)) * TIES
                other = replace(option, score=option.score + more, needs=choice.needs, number=len(known))
                if other.score > best.score and search.fits(item, other):
                    known.append(choice)
                    best = other
            search.place(number, best)

    def _corrected(self, search: Search) -> bool:
        """Predict in full what was picked; where a bin would run over, count the difference from now on and say so."""
        free = list(search.free)
        more: list[tuple[Choice, str, int, tuple[tuple[int, int], ...]]] = []
        for item, option in zip(search.items, search.answer):
            if option is None:
                continue
            choice = self.choices[item.model][option.number]
            found = totals(self.parts(item.model, choice))
            lacks = {where: max(size - choice.memory.get(where, 0), 0) for where, size in found.items()}
            if any(lacks.values()):
                needs = self.room.needs(choice.place.host, lacks)
                more.append((choice, item.model, max(lacks.values()), needs))
                for number, size in needs:
                    free[number] -= size
        wrong = False
        for choice, name, lack, needs in more:
            if any(free[number] < 0 for number, _size in needs):
                wrong = True
                variant = variants(self.resolved[name])[choice.step.quant]
                devices, engine = self.devices(choice)
                widest = widest_options(self.models[name], self.resolved[name], choice.place)
                overheads = self.nodes[choice.place.host].get("overheads")
                self.ways.footprints.correct(variant, devices, engine, widest, overheads, lack)
        if wrong:
            self.ways.forget()
        return wrong

    def devices(self, choice: Choice) -> tuple[list[dict[str, Any]], str]:
        """Return the devices of a choice, and the backend."""
        own = {device["id"]: device for device in self.nodes[choice.place.host]["devices"]}
        devices = [own[name] for name in choice.place.devices]
        return devices, backend(devices[0]) if devices else "cpu"

    def parts(self, name: str, choice: Choice) -> list[dict[str, Any]]:
        """Return all that a choice takes, part by part."""
        variant = variants(self.resolved[name])[choice.step.quant]
        devices, engine = self.devices(choice)
        overheads = self.nodes[choice.place.host].get("overheads")
        found = parts(variant, self.options(self.models[name], choice), devices, engine, overheads)
        if choice.turns:
            found.append({"where": HOST, "kind": "router", "bytes": ROUTER_MIB * MIB, "source": "bound"})
        return found


def _worth(model: dict[str, Any], choice: Choice) -> int:
    """Return priority x quality in whole numbers; being there is worth something even at priority 0."""
    return round(model["priority"] * choice.quality * VALUE) + 1


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
