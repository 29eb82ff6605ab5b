# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All the ways in which a model may run: each step of its owner's lists, on each set of devices, with what it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.planner.footprint import Footprints
from ansible_collections.homelab.inference.plugins.module_utils.planner.quality import quality
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import HOST, Room, backend, worth_using

LAST_CONTEXT = 32768
LEAST_CONTEXT = 8192
# All layers, more than any model has; llama-server's own spelling of it is "all".
ALL_LAYERS = "all"
# How finely layers and experts are moved to the processor, and layers dealt out between two cards.
PARTS = 8
# Up to so many cards of one kind in a node every subset is tried, above it only neighbours.
ALL_SUBSETS = 4
# On a node whose memory is counted to the MiB, what grows while a server runs has a bound: no prompt cache beside the
# slots (its default is 8 GiB for each server), and few snapshots of sliding windows and recurrent states (32 by
# default, each as large as the state itself).
CACHE_RAM_MIB = 0
CHECKPOINTS = 2
# What the process takes that gives models their turns, beside that of the model that is awake: measured 4.1 MiB with
# llama-server 0.7.0, and what it passes on between client and model.
ROUTER_MIB = 8


@dataclass(frozen=True)
class Step:
    """What is taken from the owner's lists: positions and values."""

    quant: int
    context: int
    kv: str
    slots: int
    positions: tuple[int, int, int, int]  # in the lists quant, context, kv, slots


@dataclass(frozen=True)
class Place:
    """Where a server runs on a node."""

    host: str
    devices: tuple[str, ...]
    fit: str
    share: float = 0.0  # the part of the experts or layers on the processor
    split: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A step at a place: one way to run."""

    step: Step
    place: Place
    turns: bool
    quality: float
    memory: dict[str, int]
    needs: tuple[tuple[int, int], ...]


def variants(resolved: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files of each quant that may run, in order of preference."""
    return resolved.get("variants") or [resolved]


def contexts(model: dict[str, Any], shape: dict[str, Any]) -> list[int]:
    """Return the context lengths to try, in tokens (declaration.md).

    The declared ones, else the trained length halving down.
    """
    trained = int(shape.get("context_length") or LEAST_CONTEXT)
    if model["context"]:
        return model["context"]
    if model["mode"] == "embedding":
        return [min(trained, LEAST_CONTEXT)]
    steps = [min(trained, LAST_CONTEXT)]
    while steps[-1] // 2 >= LEAST_CONTEXT:
        steps.append(steps[-1] // 2)
    return steps


def steps(model: dict[str, Any], resolved: dict[str, Any]) -> list[Step]:
    """Return all combinations of what the owner's lists allow."""
    found = []
    for number, variant in enumerate(variants(resolved)):
        lists = (contexts(model, variant["shape"]), model["kv"], model["slots"])
        for (c, context), (k, kv), (s, slots) in itertools.product(*(list(enumerate(one)) for one in lists)):
            found.append(Step(number, context, kv, slots, (number, c, k, s)))
    return found


def server_options(model: dict[str, Any], step: Step, place: Place, shape: dict[str, Any]) -> dict[str, Any]:
    """Return the llama-server options that the plan sets, the owner's C(args) included."""
    layers = int(shape.get("block_count") or 1)
    gpu_layers: int | str = ALL_LAYERS if place.devices else 0
    if place.fit == "layers_on_cpu":
        # The output layer is one more, and is the first on the GPU.
        gpu_layers = layers + 1 - round(layers * place.share)
    options: dict[str, Any] = {
        "ctx-size": step.context * step.slots,
        "parallel": step.slots,
        "kv-unified": False,
        "n-gpu-layers": gpu_layers,
        "cache-type-k": step.kv,
        "cache-type-v": step.kv,
        "kv-offload": True,
        "flash-attn": "on",
        "swa-full": False,
        "batch-size": 2048,
        "ubatch-size": 512,
        "load-mode": "auto",
        "repack": True,
        "cache-ram": CACHE_RAM_MIB,
        "ctx-checkpoints": CHECKPOINTS,
    }
    if shape.get("expert_count"):
        options["n-cpu-moe"] = round(layers * place.share) if place.fit == "experts_on_cpu" else 0
    if len(place.devices) > 1:
        options |= {"split-mode": "layer", "tensor-split": list(place.split)}
    if model["mode"] == "embedding":
        # The whole text is one batch for an embedding: a prompt longer than the physical batch is refused.
        options |= {"batch-size": step.context, "ubatch-size": step.context}
    return {**options, **model["args"]}


def device_sets(room: Room, host: str, fine: bool) -> list[list[dict[str, Any]]]:
    """Return the sets of devices that one server may use on a node: of one backend, large cards first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for device in worth_using(room.nodes[host]["devices"]):
        groups.setdefault(backend(device), []).append(device)
    found: list[list[dict[str, Any]]] = []
    for group in groups.values():
        # Stable: equal cards keep the order of their ids.
        group.sort(key=lambda device: -room.sizes[room.bins[host, device["id"]]])
        for size in range(1, len(group) + 1):
            if fine and len(group) <= ALL_SUBSETS:
                found += [list(chosen) for chosen in itertools.combinations(group, size)]
            else:
                found += [group[start : start + size] for start in range(len(group) - size + 1)]
    return found


def splits(room: Room, host: str, devices: list[dict[str, Any]], fine: bool) -> list[tuple[int, ...]]:
    """Return the ways to deal layers out to several cards: by their room, and for two cards in eighths."""
    free = room.free()
    by_room = tuple(max(free[room.bins[host, device["id"]]], 0) for device in devices)
    found = [by_room] if min(by_room) > 0 else []
    if len(devices) == 2:
        found += [(number, PARTS - number) for number in range(1, PARTS) if fine or number % 3 == 2]
    return found


def places(room: Room, host: str, shape: dict[str, Any], fine: bool) -> Iterator[Place]:
    """Yield all places for a model on a node."""
    experts = bool(shape.get("expert_count"))
    for devices in device_sets(room, host, fine):
        names = tuple(device["id"] for device in devices)
        dealt = splits(room, host, devices, fine) if len(devices) > 1 else [()]
        for split in dealt:
            yield Place(host, names, "split" if split else "one_gpu", 0.0, split)
        for split in dealt[:1]:
            for part in range(1, PARTS + 1) if fine else (PARTS // 4, PARTS // 2, PARTS):
                if experts:
                    yield Place(host, names, "experts_on_cpu", part / PARTS, split)
                if part < PARTS:
                    yield Place(host, names, "layers_on_cpu", part / PARTS, split)
    yield Place(host, (), "cpu")


class Ways:
    """All ways in which the models of a lab may run, kept while plans of it are compared."""

    def __init__(self) -> None:
        self.footprints = Footprints()
        self._kept: dict[Any, Any] = {}

    def on(self, model: dict[str, Any], resolved: dict[str, Any], host: str, room: Room, fine: bool) -> list[Choice]:
        """Return the ways of a model on a node that is empty but for what others hold, the pointless ones left out.

        :param fine: in small steps; else a selection of them.
        """
        node = room.nodes[host]
        key = (id(model), id(resolved), id(node), host, fine)
        if key not in self._kept:
            found = undominated(list(choices(model, resolved, host, room, self.footprints, fine)))
            # What the key stands for is kept with it, so that nothing else gets the same number.
            self._kept[key] = (found, model, resolved, node)
        return self._kept[key][0]

    def forget(self) -> None:
        """Ask again: predictions changed."""
        self._kept.clear()


def choices(
    model: dict[str, Any],
    resolved: dict[str, Any],
    host: str,
    room: Room,
    footprints: Footprints,
    fine: bool = True,
    all_of_them: bool = False,
) -> Iterator[Choice]:
    """Yield all ways in which a model fits into a node that is empty but for what others hold.

    :param all_of_them: those too that do not fit, for saying by how much.
    """
    ladder = stairs(model, resolved, footprints)
    cachings: dict[Step, tuple[list[int], int]] = {}
    some, few = (ladder, ladder) if fine else (_thinned(ladder, 5), _thinned(ladder, 2))
    for place in places(room, host, variants(resolved)[0]["shape"], fine):
        taken = some if place.fit == "one_gpu" else few
        yield from at(place, taken, model, resolved, room, footprints, all_of_them, cachings)


def at(
    place: Place,
    ladder: list[Step],
    model: dict[str, Any],
    resolved: dict[str, Any],
    room: Room,
    footprints: Footprints,
    all_of_them: bool = False,
    cachings: dict[Step, tuple[list[int], int]] | None = None,
) -> Iterator[Choice]:
    """Yield the ways in which a model fits at one place.

    :param cachings: what is known of a step's caches from other places; what is found is added.
    """
    free = room.free()
    node = room.nodes[place.host]
    own = {device["id"]: device for device in node["devices"]}
    found = variants(resolved)
    devices = [own[name] for name in place.devices]
    engine = backend(devices[0]) if devices else "cpu"
    widest = widest_options(model, resolved, place)
    rests: dict[int, tuple[int, int, int]] = {}
    # Wherever a model runs, its caches follow from the step alone.
    cachings = {} if cachings is None else cachings
    for step in ladder:
        variant = found[step.quant]
        options = server_options(model, step, place, variant["shape"])
        if step.quant not in rests:
            rests[step.quant] = footprints.rest(variant, widest, devices, engine, node.get("overheads"))
        if step not in cachings:
            cachings[step] = footprints.caching(variant["shape"], options)
        memory = footprints.take(variant, options, devices, cachings[step], rests[step.quant])
        needs = room.needs(place.host, memory)
        if not all_of_them and any(size > free[number] for number, size in needs):
            continue
        for turn in (False, True) if "on-demand" in model["keep"] else (False,):
            if turn:
                memory = {**memory, HOST: memory[HOST] + ROUTER_MIB}
                needs = room.needs(place.host, memory)
                if not all_of_them and any(size > free[number] for number, size in needs):
                    continue
            mood = ("wanted" if model["keep"][0] == "on-demand" else "accepted") if turn else None
            worth = quality(*step.positions, place.fit, place.share, mood)
            yield Choice(step, place, turn, worth, memory, needs)


def widest_options(model: dict[str, Any], resolved: dict[str, Any], place: Place) -> dict[str, Any]:
    """Return the options with which a model's buffers are largest at a place.

    Half of its experts or layers stands for any part: how many are moved to the processor makes little difference.
    """
    shape = variants(resolved)[0]["shape"]
    longest = Step(0, max(contexts(model, shape)), model["kv"][-1], max(model["slots"]), (0, 0, 0, 0))
    return server_options(model, longest, replace(place, share=0.5 if place.share else 0.0), shape)


def _thinned(ladder: list[Step], count: int) -> list[Step]:
    """Return the first and the last step, and some between them."""
    last = len(ladder) - 1
    return [ladder[number] for number in sorted({round(last * part / (count - 1)) for part in range(count)})]


def stairs(model: dict[str, Any], resolved: dict[str, Any], footprints: Footprints) -> list[Step]:
    """Return the steps of the owner's lists without those that take as much as a better one or more."""
    found = variants(resolved)
    alone = Place("", (), "cpu")
    kept: list[Step] = []
    least: int | None = None
    for step in sorted(steps(model, resolved), key=lambda one: -quality(*one.positions, "one_gpu")):
        shape = found[step.quant]["shape"]
        size = footprints.total(shape, server_options(model, step, alone, shape))
        if least is None or size < least:
            kept.append(step)
            least = size
    return kept


def undominated(found: list[Choice]) -> list[Choice]:
    """Return the choices of one model on one node without those that cost as much as a better one or more."""
    kept: dict[tuple[tuple[str, ...], bool], list[Choice]] = {}
    for choice in sorted(found, key=lambda one: -one.quality):
        own = choice.place.devices
        sizes = dict(choice.needs)
        for (devices, turns), better in kept.items():
            # Who takes turns takes memory that others of his group have already.
            if turns != choice.turns or (devices != own if turns else not set(devices) <= set(own)):
                continue
            if any(all(size <= sizes.get(number, 0) for number, size in one.needs) for one in better):
                break
        else:
            kept.setdefault((own, choice.turns), []).append(choice)
    return [choice for some in kept.values() for choice in some]
