# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server takes of each device, fast enough to ask it for every way in which every model of a lab may run.

Weights and caches are exact: each layer's share is asked for once, and added up for every way of laying layers out.
The compute buffer is asked for once for each kind of place, at the longest context; shorter ones take less, and more
than two cards no more than two. What the plan then picks is predicted in full, and searched again with that number
where it turns out to be larger.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import cache
from ansible_collections.homelab.inference.plugins.module_utils.memory.host import prompt_cache
from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST, layer_devices
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import settings
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import predict
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import repacked, weights

MIB = 2**20
# What a prediction may look at of a device; two cards that agree in it are alike.
CLASS = ("vendor", "memory_kind", "architecture", "memory_mib", "cap_mib")
# What of a shape makes no difference to caches and buffers; the options that make one to caches.
OF_THE_FILE = ("quant", "name", "size_label")
OF_CACHES = ("ctx-size", "parallel", "cache-type-k", "cache-type-v", "kv-unified", "kv-offload", "swa-full")
OF_CACHES += ("ubatch-size", "flash-attn", "cache-ram", "ctx-checkpoints")
# Cards beyond which one more makes no difference to what each takes.
FEW = 2


def parts(
    resolved: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    backend: str,
    overheads: dict[str, int] | None,
) -> list[dict[str, Any]]:
    """Return all that a server takes, part by part."""
    return predict(
        resolved["shape"],
        options,
        devices,
        backend,
        calibration=resolved.get("calibration"),
        overheads=overheads,
        projector=resolved.get("projector"),
        draft=resolved.get("draft"),
    )


class Footprints:
    """Predictions, kept for one plan and all that it is compared with."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[list[int], int, int]] = {}
        self._caches: dict[Any, tuple[list[int], int]] = {}
        self._rests: dict[Any, tuple[int, int]] = {}
        self._layouts: dict[Any, list[tuple[int, int]]] = {}
        self._kinds: dict[int, str] = {}
        self._orders: dict[Any, bool] = {}
        # Shapes are told apart by identity while a plan is made; keeping them keeps the numbers from being used again.
        self._shapes: list[dict[str, Any]] = []

    def take(
        self,
        resolved: dict[str, Any],
        options: dict[str, Any],
        devices: list[dict[str, Any]],
        caching: tuple[list[int], int],
        rest: tuple[int, int, int],
    ) -> dict[str, int]:
        """Return the MiB that a server takes of each of its devices and of the host.

        :param caching: what P(caching) said of these options.
        :param rest: what P(rest) said of this place.
        """
        shape = resolved["shape"]
        caches, kept = caching
        if not devices:
            sums, main = [], self._all(shape) + caches[-1]
        else:
            sums, main = self._spread(shape, options, len(devices), caches)
        on_device, on_host, first = rest
        found = {
            device["id"]: -(-(size + on_device + (first if number == 0 else 0)) // MIB)
            for number, (device, size) in enumerate(zip(devices, sums))
        }
        return {**found, HOST: -(-(main + on_host + kept) // MIB)}

    def total(self, shape: dict[str, Any], options: dict[str, Any]) -> int:
        """Return the bytes of weights and caches, wherever they lie."""
        return self._all(shape) + self.caching(shape, options)[0][-1]

    def correct(
        self,
        resolved: dict[str, Any],
        devices: list[dict[str, Any]],
        backend: str,
        widest: dict[str, Any],
        overheads: dict[str, int] | None,
        more: int,
    ) -> None:
        """Count C(more) MiB on top of what is taken beside weights and caches: the full prediction said so."""
        key = self._rest_key(resolved["shape"], widest, devices, backend, overheads)
        each, host, first = self.rest(resolved, widest, devices, backend, overheads)
        self._rests[key] = (each + more * MIB if devices else each, host + more * MIB, first)

    def _spread(
        self, shape: dict[str, Any], options: dict[str, Any], count: int, caches: list[int]
    ) -> tuple[list[int], int]:
        """Return the bytes of weights and caches on each device, and on the host.

        :param caches: the running sum of the caches of all layers.
        """
        sums, at_home, _all = self._layers(shape)
        found = []
        layout = self._layout(shape, options, count)
        experts = options.get("n-cpu-moe", 0)
        moved = self._experts(shape, experts) if experts else None
        main = at_home
        for first, end in layout:
            size = sums[end] - sums[first] + caches[end] - caches[first]
            if moved:
                away = moved[min(end, experts)] - moved[min(first, experts)]
                size, main = size - away, main + away
            found.append(size)
        # Layers before the first device's are the processor's.
        offset = layout[0][0]
        return found, main + sums[offset] + caches[offset]

    def _experts(self, shape: dict[str, Any], count: int) -> list[int]:
        sizes = [*shape["expert_bytes"], *[0] * (count + 1)]
        return list(itertools.accumulate(sizes, initial=0))

    def _layout(self, shape: dict[str, Any], options: dict[str, Any], count: int) -> list[tuple[int, int]]:
        """Return for each device its first layer and the one after its last."""
        layers = int(shape["block_count"] or 0)
        key = (layers, str(options["n-gpu-layers"]), tuple(options.get("tensor-split", ())), count)
        if key not in self._layouts:
            cards = [{"id": f"{number}", "memory_mib": 1} for number in range(count)]
            where = layer_devices(shape, options, cards)
            found, end = [], sum(name == HOST for name in where)
            for number in range(count):
                first, end = end, end + where.count(str(number))
                found.append((first, end))
            self._layouts[key] = found
        return self._layouts[key]

    def _layers(self, shape: dict[str, Any]) -> tuple[list[int], int, int]:
        """Return the running sum of the weights of all layers, what stays on the host, and all on a processor alone."""
        if id(shape) not in self._weights:
            self._shapes.append(shape)
            cards, options = _one_each(shape)
            found = totals_in_bytes(weights(shape, options, cards))
            sums = list(itertools.accumulate((found.get(card["id"], 0) for card in cards), initial=0))
            alone = sum(part["bytes"] for part in weights(shape, {**options, "repack": False}, []))
            self._weights[id(shape)] = (sums, found.get(HOST, 0), alone)
        return self._weights[id(shape)]

    def _all(self, shape: dict[str, Any]) -> int:
        return self._layers(shape)[2]

    def caching(self, shape: dict[str, Any], options: dict[str, Any]) -> tuple[list[int], int]:
        """Return the running sum of the caches of all layers, and what caches take of the host wherever layers are."""
        key = (self._kind(shape), str([options.get(name) for name in OF_CACHES]))
        if key not in self._caches:
            cards, spread = _one_each(shape)
            found = totals_in_bytes(cache(shape, {**options, **spread}, cards))
            sums = itertools.accumulate((found.get(card["id"], 0) for card in cards), initial=0)
            kept = prompt_cache(shape, options, settings(options, shape))
            self._caches[key] = (list(sums), kept + found.get(HOST, 0))
        return self._caches[key]

    def _kind(self, shape: dict[str, Any]) -> str:
        """Return what tells one architecture from another, whatever its quant."""
        if id(shape) not in self._kinds:
            self._shapes.append(shape)
            plain = {name: value for name, value in shape.items() if not name.endswith("_bytes")}
            self._kinds[id(shape)] = json.dumps(
                {name: value for name, value in plain.items() if name not in OF_THE_FILE}, sort_keys=True
            )
        return self._kinds[id(shape)]

    def _reorders(self, shape: dict[str, Any], widest: dict[str, Any], devices: list[dict[str, Any]]) -> bool:
        """Return whether the processor keeps weights in another order than the file."""
        key = (id(shape), len(devices), str(widest["n-gpu-layers"]), widest.get("n-cpu-moe"), widest["repack"])
        if key not in self._orders:
            self._shapes.append(shape)
            self._orders[key] = repacked(shape, widest, devices) > 0
        return self._orders[key]

    def _rest_key(
        self,
        shape: dict[str, Any],
        widest: dict[str, Any],
        devices: list[dict[str, Any]],
        backend: str,
        overheads: dict[str, int] | None,
    ) -> Any:
        learned = json.dumps(overheads, sort_keys=True) if overheads else ""
        return (
            self._kind(shape),
            backend,
            len(devices) if learned else min(len(devices), FEW),
            tuple(str(value) for name, value in widest.items() if name != "tensor-split"),
            # Where weights are kept in another order the kernel needs room to read ahead.
            self._reorders(shape, widest, devices),
            learned and tuple(device["id"] for device in devices),
            learned,
        )

    def rest(
        self,
        resolved: dict[str, Any],
        widest: dict[str, Any],
        devices: list[dict[str, Any]],
        backend: str,
        overheads: dict[str, int] | None,
    ) -> tuple[int, int, int]:
        """Return the bytes beside weights and caches: of each device, of the host, and of the first device only.

        :param widest: the options that take most, of those that the model may have on such devices.
        """
        key = self._rest_key(resolved["shape"], widest, devices, backend, overheads)
        if key not in self._rests:
            found: dict[str, int] = {}
            extra = 0
            asked = devices if overheads else devices[:FEW]
            for part in parts(resolved, widest, asked, backend, overheads):
                if part["kind"] in ("weights", "kv", "recurrent", "repack", "prompt_cache"):
                    continue
                if part["kind"] in ("projector", "draft") and part["where"] != HOST:
                    extra += part["bytes"]
                    continue
                found[part["where"]] = found.get(part["where"], 0) + part["bytes"]
            each = max((found.get(device["id"], 0) for device in asked), default=0)
            self._rests[key] = (each, found.get(HOST, 0), extra)
        return self._rests[key]


def totals_in_bytes(found: list[dict[str, Any]]) -> dict[str, int]:
    """Return the bytes that parts take of each place."""
    sums: dict[str, int] = {}
    for part in found:
        sums[part["where"]] = sums.get(part["where"], 0) + part["bytes"]
    return sums


def _one_each(shape: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return as many devices as the model has layers, the output's included, and the options that give each its own."""
    count = int(shape["block_count"] or 0) + 1
    cards = [{"id": f"{number}", "vendor": "nvidia", "memory_mib": 1, "cap_mib": None} for number in range(count)]
    return cards, {"n-gpu-layers": "all", "tensor-split": [1] * count, "split-mode": "layer", "n-cpu-moe": 0}
