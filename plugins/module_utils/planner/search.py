# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Picks one choice for each server, so that the sum of their scores is as high as the room allows.

Branch and bound over all servers where they are few; where they are many, over small neighbourhoods of a first plan,
again and again, until none of them gets better. It counts steps, not seconds, and rolls no dice: the same problem has
the same answer on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# Steps of branch and bound over everything, and over one neighbourhood; up to so many servers the first is tried.
WHOLE_STEPS, PART_STEPS, WHOLE_ITEMS = 20000, 400, 14
# Servers that are moved about together, and steps that all neighbourhoods may take together.
NEIGHBOURS, ALL_PARTS_STEPS = 6, 60000


@dataclass
class Option:
    """One way for one server; C(needs) are C((bin, MiB)), servers with the same C(group) take turns."""

    score: int
    host: str
    needs: tuple[tuple[int, int], ...]
    group: tuple[str, tuple[str, ...]] | None
    number: int  # what it stands for, among the choices of its model
    quant: int  # all servers of a model have the same file
    even: bool = False  # among equals, the one with the emptiest devices comes first


@dataclass
class Item:
    """One server that is wanted."""

    model: str
    first: bool  # the others of its model are there only if this one is
    unit: int  # servers of one unit are moved about together
    options: list[Option]
    others: frozenset[str] = frozenset()  # models that had better be elsewhere
    best: int = field(init=False)

    def __post_init__(self) -> None:
        self.options.sort(key=lambda option: -option.score)
        self.best = self.options[0].score if self.options else 0


class Search:
    """A problem and the best answer so far: per item the position of its option, or None."""

    def __init__(self, items: list[Item], free: list[int], kinds: list[int], apart: int, grain: int) -> None:
        """Start.

        :param kinds: per bin a number; bins of the same number are alike for all items.
        :param apart: what a score loses where two models lie together that had better not.
        :param grain: a smaller gain in the sum is worth no search through everything.
        """
        self.items = items
        self.sizes = [max(size, 1) for size in free]
        self.kinds = kinds
        self.apart = apart
        self.grain = grain
        self.turns = any(option.group for item in items for option in item.options)
        self.free = list(free)
        self.answer: list[Option | None] = [None] * len(items)
        self.groups: dict[tuple[str, tuple[str, ...]], dict[int, int]] = {}
        self.members: dict[tuple[str, tuple[str, ...]], int] = {}
        self.hosts: dict[str, dict[str, int]] = {}  # of each model, with the quant
        self.where: dict[str, dict[str, int]] = {}

    # --- the state: what is placed, and what is left ---------------------------------------------------------------

    def fits(self, item: Item, option: Option) -> bool:
        """Say whether there is room, and no server of the same model on the node or with another file."""
        free = self.free
        if option.group is None:
            for number, size in option.needs:
                if size > free[number]:
                    return False
        else:
            held = self.groups.get(option.group, {})
            for number, size in option.needs:
                if size - held.get(number, 0) > free[number]:
                    return False
        hosts = self.hosts.get(item.model)
        return not hosts or (option.host not in hosts and option.quant in hosts.values())

    def place(self, number: int, option: Option) -> int:
        """Put a server there; return its score, less what it loses for its neighbours."""
        item = self.items[number]
        if option.group is None:
            for one, size in option.needs:
                self.free[one] -= size
        else:
            held = self.groups.setdefault(option.group, {})
            self.members[option.group] = self.members.get(option.group, 0) + 1
            for one, size in option.needs:
                more = size - held.get(one, 0)
                if more > 0:
                    held[one] = size
                    self.free[one] -= more
        self.hosts.setdefault(item.model, {})[option.host] = option.quant
        here = self.where.setdefault(option.host, {})
        together = sum(here.get(other, 0) for other in item.others) if item.others else 0
        here[item.model] = here.get(item.model, 0) + 1
        self.answer[number] = option
        return option.score - self.apart * together

    def lift(self, number: int) -> None:
        """Take a server away again."""
        item, option = self.items[number], self.answer[number]
        if option is None:
            return
        self.answer[number] = None
        if option.group is None:
            for one, size in option.needs:
                self.free[one] += size
        else:
            held = self.groups[option.group]
            self.members[option.group] -= 1
            left: dict[int, int] = {}
            for other in self.answer:
                if other is not None and other.group == option.group:
                    for one, size in other.needs:
                        left[one] = max(left.get(one, 0), size)
            for one, size in held.items():
                self.free[one] += size - left.get(one, 0)
            self.groups[option.group] = left
        del self.hosts[item.model][option.host]
        self.where[option.host][item.model] -= 1

    def total(self) -> int:
        """Return the score of what is placed."""
        score = 0
        here: dict[str, list[str]] = {}
        for item, option in zip(self.items, self.answer):
            if option is not None:
                score += option.score - self.apart * sum(other in item.others for other in here.get(option.host, ()))
                here.setdefault(option.host, []).append(item.model)
        return score

    def allowed(self, number: int) -> bool:
        """Say whether the first server of its model is there, where that is asked."""
        item = self.items[number]
        return item.first or any(
            other.first and other.model == item.model and option is not None
            for other, option in zip(self.items, self.answer)
        )

    # --- looking ---------------------------------------------------------------------------------------------------

    def ways(self, item: Item, start: int) -> Iterator[Option]:
        """Yield the options that fit, best first; of those that come to the same only one."""
        options = item.options
        end = len(options)
        while start < end:
            score = options[start].score
            run = []
            while start < end and options[start].score == score:
                if self.fits(item, options[start]):
                    run.append(options[start])
                start += 1
            if len(run) > 1:
                if run[0].even:
                    run.sort(key=self._fullness)
                if not self.turns:
                    run = self._unlike(run)
            yield from run

    def _fullness(self, option: Option) -> float:
        return max((size - self.free[number]) / self.sizes[number] for number, size in option.needs)

    def _unlike(self, run: list[Option]) -> list[Option]:
        kept, seen = [], set()
        for option in run:
            state = (
                option.host,
                tuple(sorted((self.kinds[number], self.free[number], size) for number, size in option.needs)),
            )
            if state not in seen:
                seen.add(state)
                kept.append(option)
        return kept

    def fill(self, numbers: list[int]) -> None:
        """Give each server in turn the best that is left."""
        for number in numbers:
            if self.answer[number] is None and self.allowed(number):
                option = next(self.ways(self.items[number], 0), None)
                if option:
                    self.place(number, option)

    def improve(self, numbers: list[int], steps: int, grain: int) -> int:
        """Look for better options for some servers, all others staying; return the steps taken."""
        before = {number: self.answer[number] for number in numbers}
        whole = self.total()
        for number in numbers:
            self.lift(number)
        rest = self.total()
        tree = _Tree(self, numbers, whole - rest, steps, grain)
        tree.walk(0, 0, [0] * len(numbers))
        best = tree.found if tree.found is not None else before
        for number, option in best.items():
            if option is not None:
                self.place(number, option)
        return tree.steps

    def run(self, start: list[Option | None]) -> None:
        """Find a good answer, beginning with C(start) as far as it fits."""
        order = list(range(len(self.items)))
        for number in order:
            option = start[number]
            if option is not None and self.allowed(number) and self.fits(self.items[number], option):
                self.place(number, option)
        self.fill(order)
        self._neighbourhoods()
        if len(self.items) <= WHOLE_ITEMS:
            by_worth = sorted(order, key=lambda number: (-self.items[number].best, number))
            by_worth.sort(key=lambda number: not self.items[number].first)
            self.improve(by_worth, WHOLE_STEPS, self.grain)

    def _neighbourhoods(self) -> None:
        steps, score = 0, self.total()
        units: dict[int, list[int]] = {}
        for number, item in enumerate(self.items):
            units.setdefault(item.unit, []).append(number)
        while steps < ALL_PARTS_STEPS:
            for unit in sorted(units, key=lambda unit: -self._missing(units[unit])):
                if not self._missing(units[unit]):
                    break
                for numbers in self._around(unit, units):
                    steps += self.improve(numbers, PART_STEPS, 1)
                if steps >= ALL_PARTS_STEPS:
                    break
            now = self.total()
            if now <= score:
                return
            score = now

    def _missing(self, numbers: list[int]) -> int:
        """Return how far servers are from the best they could have."""
        found = 0
        for number in numbers:
            option = self.answer[number]
            found += self.items[number].best - (option.score if option else 0)
        return found

    def _around(self, unit: int, units: dict[int, list[int]]) -> Iterator[list[int]]:
        """Yield, for each node that a unit may run on, the unit together with servers of that node."""
        own = units[unit]
        hosts = dict.fromkeys(option.host for option in self.items[own[0]].options)
        for host in hosts:
            there = [
                other
                for other, numbers in units.items()
                if other != unit and any(self._on(number, host) for number in numbers)
            ]
            there.sort(key=lambda other: sum(self._held(number) for number in units[other]))
            for start in range(0, max(len(there), 1), NEIGHBOURS - 1):
                chosen = there[start : start + NEIGHBOURS - 1]
                yield sorted([*own, *(number for other in chosen for number in units[other])])

    def _on(self, number: int, host: str) -> bool:
        option = self.answer[number]
        return option is not None and option.host == host

    def _held(self, number: int) -> int:
        option = self.answer[number]
        return option.score if option else 0


class _Tree:
    """Depth-first branch and bound over some servers."""

    def __init__(self, search: Search, numbers: list[int], best: int, limit: int, grain: int) -> None:
        self.search = search
        self.numbers = numbers
        self.best = best
        self.limit = limit
        self.grain = grain
        self.steps = 0
        self.found: dict[int, Option | None] | None = None

    def walk(self, depth: int, score: int, heads: list[int]) -> None:
        """Try everything for the servers from C(depth) on.

        :param heads: per server the first option that may still fit: what does not fit now will not fit further down.
        """
        self.steps += 1
        search, numbers = self.search, self.numbers
        heads = list(heads)
        bound, first = score, 0
        for index in range(depth, len(numbers)):
            item = search.items[numbers[index]]
            options = item.options
            head, end = heads[index], len(options)
            while head < end and not search.fits(item, options[head]):
                head += 1
            heads[index] = head
            worth = options[head].score if head < end else 0
            bound += worth
            if index == depth:
                first = worth
        if bound < self.best + self.grain:
            return
        if depth == len(numbers):
            self.best = score
            self.found = {number: search.answer[number] for number in numbers}
            return
        number = numbers[depth]
        item = search.items[number]
        rest = bound - score - first
        if search.allowed(number):
            for option in search.ways(item, heads[depth]):
                if self.steps >= self.limit or score + option.score + rest < self.best + self.grain:
                    break
                gained = search.place(number, option)
                self.walk(depth + 1, score + gained, heads)
                search.lift(number)
        if self.steps < self.limit and score + rest >= self.best + self.grain:
            self.walk(depth + 1, score, heads)
