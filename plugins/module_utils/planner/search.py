# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Picks one choice for each server, so that the sum of their scores is as high as the room allows.

Branch and bound over all servers where they are few; where they are many, over small neighbourhoods of a first plan,
again and again, until none of them gets better. It counts steps, not seconds, and rolls no dice: the same problem has
the same answer on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Steps of branch and bound: over everything, over each small set, over one neighbourhood; up to so many servers the
# first two are tried, above it the last.
WHOLE_STEPS, SET_STEPS, PART_STEPS, WHOLE_ITEMS = 25000, 1000, 200, 10
# Servers that are moved about together, and steps that all neighbourhoods may take together.
NEIGHBOURS, ALL_PARTS_STEPS = 6, 20000
LARGEST_SET, ALL_SETS_STEPS = 4, 60000
# How often prices of memory are adjusted before a search.
PRICE_ROUNDS = 60


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
        self.few = len(items) <= WHOLE_ITEMS
        self.turns = any(option.group for item in items for option in item.options)
        self.room = list(free)
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
        together = self._together_with(item, option.host) if item.others else 0
        here = self.where.setdefault(option.host, {})
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

    def first_way(self, item: Item) -> Option | None:
        """Return the best option that fits; of several one away from its fallbacks, on the emptiest devices."""
        run: list[Option] = []
        for option in item.options:
            if run and option.score < run[0].score:
                break
            if self.fits(item, option):
                run.append(option)
        if not run:
            return None
        return min(self.alike(run), key=lambda option: self._together_with(item, option.host))

    def _together_with(self, item: Item, host: str) -> int:
        here = self.where.get(host, {})
        return sum(here.get(other, 0) for other in item.others)

    def alike(self, run: list[Option]) -> list[Option]:
        """Return options of one score, emptiest devices first; of those that come to the same only one."""
        if run[0].even:
            run = sorted(run, key=self._fullness)
        if self.turns:
            return run
        kept, seen = [], set()
        for option in run:
            state = (
                option.host,
                option.score,
                tuple(sorted((self.kinds[number], self.free[number], size) for number, size in option.needs)),
            )
            if state not in seen:
                seen.add(state)
                kept.append(option)
        return kept

    def _fullness(self, option: Option) -> float:
        return max((size - self.free[number]) / self.sizes[number] for number, size in option.needs)

    def fill(self, numbers: list[int]) -> None:
        """Give each server in turn the best that is left."""
        for number in numbers:
            if self.answer[number] is None and self.allowed(number):
                option = self.first_way(self.items[number])
                if option:
                    self.place(number, option)

    def improve(self, numbers: list[int], steps: int, grain: int) -> int:
        """Look for better options for some servers, all others staying; return the steps taken."""
        before = {number: self.answer[number] for number in numbers}
        whole = self.total()
        for number in numbers:
            self.lift(number)
        rest = self.total()
        tree = _Tree(self, numbers, whole - rest, grain)
        tree.run(steps)
        best = tree.found if tree.found is not None else before
        for number, option in best.items():
            if option is not None:
                self.place(number, option)
        return tree.steps

    def begin(self, start: list[Option | None], unit: int | None = None) -> None:
        """Take C(start) as far as it fits, and give the others what is left, the servers of C(unit) first."""
        order = list(range(len(self.items)))
        for number in order:
            option = start[number]
            if option is not None and self.allowed(number) and self.fits(self.items[number], option):
                self.place(number, option)
        order.sort(key=lambda number: (self.items[number].unit != unit, not self.items[number].first, number))
        self.fill(order)

    def run(self, start: list[Option | None], unit: int | None = None) -> None:
        """Find a good answer, beginning with C(start) and then with the servers of C(unit)."""
        self.begin(start, unit)
        if self.few:
            self._together()
        else:
            self._neighbourhoods()

    def exhaust(self) -> None:
        """Look through everything, as far as the steps go, where servers are few.

        Once from the servers that are worth least: what they need decides what is left for the others, and the tree is
        often small that way. Once from those that need most: they have the fewest places.
        """
        if self.few:
            for measure in (_worth_at_best, _size_at_best):
                order = sorted(range(len(self.items)), key=lambda number: (measure(self.items[number]), number))
                order.sort(key=lambda number: not self.items[number].first)
                self.improve(order, WHOLE_STEPS, self.grain)

    def make_way(self, model: str) -> None:
        """Move others about, and give them less, so that the servers of one model find room."""
        units: dict[int, list[int]] = {}
        for number, item in enumerate(self.items):
            units.setdefault(item.unit, []).append(number)
        for unit, numbers in units.items():
            if self.items[numbers[0]].model == model:
                for chosen in self._around(unit, units):
                    self.improve(chosen, SET_STEPS, 1)

    def _together(self) -> None:
        """Look for better options for each unit, all pairs, threes and so on, as long as something gets better."""
        units: dict[int, list[int]] = {}
        for number, item in enumerate(self.items):
            units.setdefault(item.unit, []).append(number)
        steps, size, score = 0, 1, self.total()
        while size <= min(LARGEST_SET, len(units) - 1) and steps < ALL_SETS_STEPS:
            for chosen in itertools.combinations(units.values(), size):
                if any(self._missing(numbers) for numbers in chosen):
                    steps += self.improve([number for numbers in chosen for number in numbers], SET_STEPS, 1)
            now = self.total()
            size, score = (1, now) if now > score else (size + 1, now)

    def _neighbourhoods(self) -> None:
        steps, score = 0, self.total()
        units: dict[int, list[int]] = {}
        for number, item in enumerate(self.items):
            units.setdefault(item.unit, []).append(number)
        # Where nothing changed since, nothing better will be found.
        tried: set[tuple[Any, ...]] = set()
        while steps < ALL_PARTS_STEPS:
            for unit in sorted(units, key=lambda unit: -self._missing(units[unit])):
                if not self._missing(units[unit]):
                    break
                for numbers in self._around(unit, units):
                    state = (*numbers, *(id(self.answer[number]) for number in numbers), *self.free)
                    if state not in tried:
                        steps += self.improve(numbers, PART_STEPS, 1)
                        tried.add((*numbers, *(id(self.answer[number]) for number in numbers), *self.free))
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


def _worth_at_best(item: Item) -> int:
    return item.best


def _size_at_best(item: Item) -> int:
    return -sum(size for _bin, size in item.options[0].needs) if item.options else 0


class _Tree:
    """Depth-first branch and bound over some servers.

    The bound is Lagrange's: memory has a price in each bin, every server takes what is worth most beyond its price, and
    what is left of the memory is sold. No real plan is worth more, whatever the prices are; good ones come from raising
    the price where servers together want more than there is.
    """

    def __init__(self, search: Search, numbers: list[int], best: int, grain: int) -> None:
        self.search = search
        self.numbers = numbers
        self.best = best
        self.grain = grain
        self.steps = self.limit = self.goal = 0
        self.found: dict[int, Option | None] | None = None
        # What does not fit now will not fit beside others.
        self.options = [
            [option for option in search.items[number].options if search.fits(search.items[number], option)]
            for number in numbers
        ]
        # Of each server the others of its model that come after it: they run on other nodes.
        self.later = [
            [
                later
                for later in range(index + 1, len(numbers))
                if search.items[numbers[later]].model == search.items[number].model
            ]
            for index, number in enumerate(numbers)
        ]
        self.prices: dict[int, int] = self._prices() if len(numbers) > 3 else {}
        self.ranked = [self._ranked(options) for options in self.options]

    def _prices(self) -> dict[int, int]:
        """Return a price for each bin, found by raising and lowering prices along with demand (subgradients)."""
        free = self.search.free
        wanted: dict[int, int] = {}
        for options in self.options:
            largest: dict[int, int] = {}
            for option in options:
                for number, size in option.needs if option.group is None else ():
                    largest[number] = max(largest.get(number, 0), size)
            for number, size in largest.items():
                wanted[number] = wanted.get(number, 0) + size
        scarce = [number for number, size in wanted.items() if size > free[number]]
        if not scarce:
            return {}
        prices = dict.fromkeys(scarce, 0.0)
        best, lowest, pace, since = dict(prices), float("inf"), 1.0, 0
        plain = [
            [
                (
                    float(option.score),
                    option.host,
                    [(n, s) for n, s in option.needs if n in prices] if option.group is None else [],
                )
                for option in options
            ]
            for options in self.options
        ]
        goal = float(self.best)
        for _round in range(PRICE_ROUNDS):
            total = sum(price * free[number] for number, price in prices.items())
            over = {number: -free[number] for number in scarce}
            elsewhere: list[set[str]] = [set() for _index in self.numbers]
            for index, options in enumerate(plain):
                most, taken, home = 0.0, None, None
                for score, host, needs in options:
                    if score <= most:
                        break
                    if host in elsewhere[index]:
                        continue
                    for number, size in needs:
                        score -= prices[number] * size
                    if score > most:
                        most, taken, home = score, needs, host
                total += most
                for number, size in taken or ():
                    over[number] += size
                for later in self.later[index] if home else ():
                    elsewhere[later].add(home)
            since += 1
            if total < lowest:
                lowest, best, since = total, dict(prices), 0
            elif since >= 4:
                pace, since = pace / 2, 0
            length = sum(one * one for number, one in over.items() if one > 0 or prices[number] > 0)
            if not length or total <= goal:
                break
            stride = pace * (total - goal) / length
            prices = {number: max(0.0, price + stride * over[number]) for number, price in prices.items()}
        return {number: int(price) for number, price in best.items() if price >= 1}

    def _ranked(self, options: list[Option]) -> list[tuple[int, Option]]:
        """Return options with what they are worth beyond the price of their memory, best first."""
        found = []
        for option in options:
            worth = option.score
            if option.group is None:
                for number, size in option.needs:
                    worth -= self.prices.get(number, 0) * size
            found.append((worth, option))
        found.sort(key=lambda one: -one[0])
        return found

    def run(self, steps: int) -> None:
        """Look for something better, for so many steps."""
        self.goal, self.limit = self.best + self.grain, steps
        self.walk(0, 0, [0] * len(self.numbers))

    def walk(self, depth: int, score: int, heads: list[int]) -> None:
        """Try everything for the servers from C(depth) on.

        :param heads: per server the first option that may still fit: what does not fit now will not fit further down.
        """
        self.steps += 1
        search, numbers = self.search, self.numbers
        if depth == len(numbers):
            if score >= self.goal:
                self.best = score
                self.goal = score + self.grain
                self.found = {number: search.answer[number] for number in numbers}
            return
        heads = list(heads)
        sold = sum(price * search.free[number] for number, price in self.prices.items())
        rest = 0
        elsewhere: list[set[str]] = [set() for _index in numbers]
        for index in range(depth, len(numbers)):
            item = search.items[numbers[index]]
            ranked = self.ranked[index]
            head, end = heads[index], len(ranked)
            while head < end and not search.fits(item, ranked[head][1]):
                head += 1
            heads[index] = head
            if index > depth:
                while head < end and (
                    ranked[head][1].host in elsewhere[index] or not search.fits(item, ranked[head][1])
                ):
                    head += 1
                if head < end and ranked[head][0] > 0:
                    rest += ranked[head][0]
                    for later in self.later[index]:
                        elsewhere[later].add(ranked[head][1].host)
        number = numbers[depth]
        item = search.items[number]
        if search.allowed(number):
            for worth, option in self._ways(item, depth, heads[depth]):
                if self.steps >= self.limit or worth + score + rest + sold < self.goal:
                    break
                gained = search.place(number, option)
                self.walk(depth + 1, score + gained, heads)
                search.lift(number)
        if self.steps < self.limit and score + rest + sold >= self.goal:
            self.walk(depth + 1, score, heads)

    def _ways(self, item: Item, index: int, start: int) -> Iterator[tuple[int, Option]]:
        """Yield what fits, best first; of those that come to the same only one."""
        search, ranked = self.search, self.ranked[index]
        end = len(ranked)
        while start < end:
            worth = ranked[start][0]
            run = []
            while start < end and ranked[start][0] == worth:
                if search.fits(item, ranked[start][1]):
                    run.append(ranked[start][1])
                start += 1
            for option in search.alike(run) if len(run) > 1 else run:
                yield worth, option
