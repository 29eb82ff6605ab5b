# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the engine's own dry pass said of a few contexts and batches, carried over to others of the same model.

A calibration is one dictionary: C(image) (digest), C(shape) (P(fingerprint)), C(class) (P(kind_of)), and C(points),
each with C(ubatch), C(cells) and C(buffers) in bytes by place and kind. What the rules of compute.py lack is, for the
same shape and class, a sum of four terms: one for itself, one for each token of a batch, one for each token of the
context and one for each pair of both.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST, layer_count, places
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import MIB, Settings, pad, settings

# What a file says of itself and of its weights: the same model in another quantisation computes in the same room.
OF_THE_FILE = ("name", "size_label", "quant", "type", "parameters", "tensor_count", "tokenizer", "context_length")


def fingerprint(shape: dict[str, Any]) -> str:
    """Return a digest of everything in a shape that buffers of computation depend on."""
    kept = {key: value for key, value in shape.items() if key not in OF_THE_FILE and not key.endswith("_bytes")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def kind_of(shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]]) -> str:
    """Return what must be alike for one server's buffers to tell of another's, in words."""
    chosen = settings(options, shape)
    order = {device["id"]: f"gpu{index}" for index, device in enumerate(devices)}
    layers = [order.get(place, HOST) for place in places(layer_count(shape), chosen, devices)]
    runs = [f"{layers.count(place)} {place}" for place in dict.fromkeys(layers)]
    words = [
        f"{len(devices)} devices",
        *runs,
        f"experts {min(chosen.moe_on_cpu, len(layers))}",
        f"feed-forward {min(chosen.ffn_on_cpu, len(layers))}",
        f"slots {chosen.slots}" + (" unified" if chosen.unified else ""),
        f"flash {chosen.flash_attention}",
        f"kv {chosen.type_k} {chosen.type_v}" + ("" if chosen.kv_offload else " on host"),
        f"swa-full {chosen.swa_full}",
        f"embedding {chosen.embedding}",
        f"op-offload {chosen.op_offload}",
    ]
    return ", ".join(words)


def variants(shape: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the options of the runs that a calibration is made from: these, and with half the batch and context."""
    chosen = settings(options, shape)
    small = max(pad(chosen.context // 4), 256 * chosen.slots)
    batch = max(32, chosen.ubatch // 2)
    contexts = [chosen.context] + ([small] if small < chosen.context else [])
    batches = [chosen.ubatch] + ([batch] if batch < chosen.ubatch else [])
    return [{**options, "ctx-size": context, "ubatch-size": size} for context in contexts for size in batches]


def calibration(
    image: str,
    shape: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    answers: list[tuple[dict[str, Any], dict[str, dict[str, float]]]],
) -> dict[str, Any]:
    """Return what P(variants) and the dry pass's MiB for each of them make."""
    points = []
    for given, answer in answers:
        chosen = settings(given, shape)
        found = {
            place: {kind: round(sizes.get(kind, 0.0) * MIB) for kind in ("compute", "output") if kind in sizes}
            for place, sizes in answer.items()
        }
        points.append({"ubatch": chosen.ubatch, "cells": chosen.cells, "buffers": found})
    return {
        "image": image,
        "shape": fingerprint(shape),
        "class": kind_of(shape, options, devices),
        "points": points,
    }


def fits(known: dict[str, Any], shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]]) -> bool:
    """Whether a calibration tells of this model with these options on so many devices.

    One of a single point tells nothing of more tokens than it was asked about.
    """
    if known["shape"] != fingerprint(shape) or known["class"] != kind_of(shape, options, devices):
        return False
    chosen, points = settings(options, shape), known["points"]
    return len(points) > 1 or (chosen.ubatch <= points[0]["ubatch"] and chosen.cells <= points[0]["cells"])


def corrected(known: dict[str, Any], place: str, chosen: Settings, said: dict[tuple[int, int], int], here: int) -> int:
    """Return a compute buffer: what the rules say here, plus by how much they were wrong where the engine was asked.

    :param said: what the rules say at each point, by C((ubatch, cells)).
    """
    if len(known["points"]) == 1 and (chosen.ubatch, chosen.cells) not in said:
        # Fewer tokens take no more; how much less is not known.
        (point,) = known["points"]
        seen = point["buffers"].get(place, {}).get("compute", 0)
        return min(here, seen) if said[point["ubatch"], point["cells"]] > seen else seen
    errors = {
        (point["ubatch"], point["cells"]): point["buffers"].get(place, {}).get("compute", 0)
        - said[point["ubatch"], point["cells"]]
        for point in known["points"]
    }
    if all(abs(error) < MIB // 32 for error in errors.values()):
        return here
    return max(0, here + _between(errors, chosen.ubatch, chosen.cells))


def _between(values: dict[tuple[int, int], int], ubatch: int, cells: int) -> int:
    """Return the value at a point of the plane through those that are known, which lie on a grid."""
    batches, contexts = sorted({key[0] for key in values}), sorted({key[1] for key in values})

    def along(low: float, high: float, ends: list[int], at: int) -> float:
        return low if len(ends) < 2 else low + (high - low) * (at - ends[0]) / (ends[-1] - ends[0])

    rows = [along(values[batches[0], context], values[batches[-1], context], batches, ubatch) for context in contexts]
    return round(along(rows[0], rows[-1], contexts, cells))
