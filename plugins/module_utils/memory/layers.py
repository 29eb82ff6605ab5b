# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which device a layer lies on, by llama.cpp's own rule (load_tensors in src/llama-model.cpp of 0.7.0)."""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.options import Settings, settings

HOST = "host"
MOST_LAYERS = 512  # that the engine takes


def layer_devices(shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]]) -> list[str]:
    """Return the device of each layer, and of the output layer as the last item; the processor is C(host).

    The output layer counts as a layer and is the first to be offloaded.
    """
    return places(layer_count(shape), settings(options, shape), devices)


def layer_count(shape: dict[str, Any]) -> int:
    """Return the engine's number of layers: two architectures have more of them than their files have blocks."""
    layers = int(shape["block_count"] or 0)
    if shape.get("architecture") == "nanbeige":  # goes through its blocks several times
        return layers * max(1, min(int(shape["hparams"].get("num_loops") or 1), MOST_LAYERS // max(1, layers)))
    return layers + (shape.get("architecture") == "graniteswitch")  # has a layer that chooses the adapter


def places(layers: int, chosen: Settings, devices: list[dict[str, Any]]) -> list[str]:
    """Return the same as layer_devices, from settings."""
    if chosen.split_mode == "none" and devices:
        devices = [devices[min(chosen.main_gpu, len(devices) - 1)]]
    if not devices or not chosen.gpu_layers:
        return [HOST] * (layers + 1)
    ends = _ends(chosen, devices)
    offloaded = min(chosen.gpu_layers, layers + 1)
    first = layers + 1 - offloaded
    result = [HOST] * first
    for index in range(offloaded):
        result.append(devices[bisect_right(ends, _single(index / offloaded))]["id"])
    return result


def _ends(chosen: Settings, devices: list[dict[str, Any]]) -> list[float]:
    """Return where each device's part of the layers ends, from 0 to 1, in the engine's single precision."""
    shares = [*chosen.split, *[0.0] * len(devices)][: len(devices)]
    if not any(shares):
        shares = [float(device.get("cap_mib") or device["memory_mib"]) for device in devices]
    if not any(shares):
        shares = [1.0] * len(devices)
    sums, total = [], 0.0
    for share in shares:
        total = _single(total + _single(share))
        sums.append(total)
    return [_single(part / total) for part in sums]


def _single(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])
