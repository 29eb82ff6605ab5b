# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compute and output buffers of a server, from the header of its model alone.

The forward pass is laid out as the engine lays it out (forward.py) and given room as the engine's allocator gives it
(graph.py). An architecture that is not known there gets an upper bound, and its parts say so.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import _Model
from ansible_collections.homelab.inference.plugins.module_utils.memory.calibration import corrected, fits
from ansible_collections.homelab.inference.plugins.module_utils.memory.forward import (
    EXPERTS_LIKE_DENSE,
    FAMILIES,
    Family,
    Forward,
    Layer,
    Pass,
)
from ansible_collections.homelab.inference.plugins.module_utils.memory.graph import HOST as PROCESSOR
from ansible_collections.homelab.inference.plugins.module_utils.memory.graph import sizes
from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST, layer_count, places
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import ALL_LAYERS, Settings, settings

UNPACKS = ("cuda", "rocm")  # large batches attend to keys and values of type F16 only (fattn.cu)
LENDS_NOTHING = ("cpu", "emulated")
LENT_FROM = 32  # tokens of a batch, from which on a GPU computes for the processor
COPIES = 4  # batches that several devices work on at the same time (GGML_SCHED_MAX_COPIES)
PERIODS = (1, 2, 3, 4, 5, 6, 8)  # after how many layers a model repeats itself
KEPT, KEPT_LAYERS = 2, 3  # groups and layers that are laid out before repetitions are left out


def compute(
    shape: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    backend: str,
    calibration: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the parts of kind compute and output.

    :param calibration: what the engine's dry pass said (see calibration.py); of another model or for other options it
        is passed over.
    """
    chosen = settings(options, shape)
    source = "bound" if unknown(shape) else "computed"
    found = buffers(shape, chosen, devices, backend)
    lent = _lent(shape, chosen, devices, backend)
    if lent:
        first = devices[0]["id"]
        found[first] = max(found[first], lent)
    if calibration and fits(calibration, shape, options, devices):
        source = "calibrated"
        found = _calibrated(calibration, shape, options, devices, backend, found)
    parts = [
        {"where": place, "kind": "compute", "bytes": size, "source": source} for place, size in found.items() if size
    ]
    if lent and source == "computed":
        parts = [{**part, "source": "bound"} if part["where"] == first else part for part in parts]
    size = output_bytes(shape, chosen)
    if size:
        parts.append({"where": HOST, "kind": "output", "bytes": size, "source": source})
    return parts


def _lent(shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]], backend: str) -> int:
    """Return the most that the first device needs for layers of the processor, 0 where it does not help it.

    A GPU computes large batches for it: the weights come over one matrix after the other, and what is computed with
    them lies there too. A device behind RPC does not.
    """
    if not devices or backend in LENDS_NOTHING or not chosen.op_offload or chosen.ubatch < LENT_FROM:
        return 0
    where = places(layer_count(shape), chosen, devices)
    matrices = [0]
    # A header may name more layers than it says there are.
    for index, (block, experts) in enumerate(zip(shape["block_bytes"][: len(where)], shape["expert_bytes"])):
        if where[index] == HOST:
            matrices.append((block - experts) * 2 // 5)
        if where[index] == HOST or index < chosen.moe_on_cpu:
            matrices.append(experts * (7 if shape["architecture"] == "gemma4" else 5) // 10)
        if index < chosen.ffn_on_cpu:
            matrices.append((block - experts) * 2 // 5)
    if not max(matrices):
        return 0
    everything = replace(chosen, gpu_layers=ALL_LAYERS, moe_on_cpu=0, ffn_on_cpu=0, split=(1.0,), split_mode="layer")
    return buffers(shape, everything, devices[:1], backend)[devices[0]["id"]] + max(matrices)


def _calibrated(
    known: dict[str, Any],
    shape: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    backend: str,
    found: dict[str, int],
) -> dict[str, int]:
    chosen = settings(options, shape)
    said: dict[str, dict[tuple[int, int], int]] = {place: {} for place in found}
    for point in known["points"]:
        there = {**options, "ubatch-size": point["ubatch"], "ctx-size": point["cells"] * chosen.streams}
        for place, size in buffers(shape, settings(there, shape), devices, backend).items():
            said[place][point["ubatch"], point["cells"]] = size
    names = {device["id"]: f"gpu{index}" for index, device in enumerate(devices)}
    return {
        place: corrected(known, names.get(place, place), chosen, said[place], size) for place, size in found.items()
    }


def unknown(shape: dict[str, Any]) -> list[str]:
    """Return why the compute buffers are only upper bounds, as sentences; nothing when they are exact."""
    architecture = shape.get("architecture")
    if architecture in FAMILIES:
        return []
    return [f"How the architecture {architecture} computes is not known: its compute buffers are upper bounds."]


def output_bytes(shape: dict[str, Any], chosen: Settings) -> int:
    """Return the bytes in which results wait on the host: logits, and embeddings where they are asked for."""
    width = int(shape["vocab_size"] or 0) + (int(shape["embedding_length"] or 0) if chosen.embedding else 0)
    return 4 * width * chosen.slots


def buffers(
    shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]], backend: str = "emulated"
) -> dict[str, int]:
    """Return the bytes of the compute buffer of each device and of the host."""
    names = [*(device["id"] for device in devices), HOST]
    if not layer_count(shape):
        return {}
    family = FAMILIES.get(str(shape.get("architecture")))
    model = _pass(shape, chosen, devices, family or Family())
    if backend in UNPACKS:
        model = replace(model, unpacked=(chosen.type_k != "f16", chosen.type_v != "f16"))
    copies = COPIES if _pipelined(shape, chosen, devices) else 1
    found = list(_sizes(model, len(devices), copies))
    if family is None:
        found = [size and size + size // 4 + _extra(model) for size in found]
    return dict(zip(names, found))


def _pipelined(shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]]) -> bool:
    """Whether several devices work on several batches at once: only when they have all layers and all weights."""
    return (
        len(devices) > 1
        and chosen.split_mode == "layer"
        and chosen.gpu_layers > layer_count(shape)
        and chosen.kv_offload
        and not chosen.moe_on_cpu
        and not chosen.ffn_on_cpu
    )


@lru_cache(maxsize=4096)
def _sizes(model: Pass, devices: int, copies: int) -> tuple[int, ...]:
    return tuple(sizes(Forward(model).build(), devices, copies))


def _extra(model: Pass) -> int:
    """What an unknown architecture may need beyond a common one: more copies of a token's vector, and states."""
    inner, state, groups, _heads, _kernel = model.state
    heads, key = model.indexer
    choosing = 3 * heads * key + 8 * model.cells if heads and key else 0
    return 4 * model.tokens * (4 * model.width + 6 * (inner + 2 * groups * state) + choosing)


def _pass(shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]], family: Family) -> Pass:
    """Return what the graph of the largest batch depends on."""
    given = shape["hparams"]
    model = _Model(shape, chosen)
    layers = _layers(shape, chosen, devices, family, model)
    key, value = int(shape["key_length"] or 0), int(shape["value_length"] or 0)

    def number(name: str, default: int = 0) -> int:
        found = given.get(name)
        if isinstance(found, list):
            return max(found, default=default)
        return default if found is None else int(found)

    rank = number("attention.kv_lora_rank")
    expert_forward = max((layer.forward for layer in layers), default=0)
    if str(shape["architecture"]) not in EXPERTS_LIKE_DENSE:
        expert_forward = number("expert_feed_forward_length") or expert_forward
    shared = number("expert_shared_feed_forward_length") or number("expert_shared_count") * expert_forward
    turned = [kind.startswith(("q", "iq")) and family.kind != "latent" for kind in (chosen.type_k, chosen.type_v)]
    sequences = min(chosen.slots, chosen.ubatch)
    tokens = -(-chosen.ubatch // sequences) * sequences  # all sequences get as many
    architecture = str(shape["architecture"])
    return Pass(
        family=family,
        width=int(shape["embedding_length"] or 0),
        vocabulary=int(shape["vocab_size"] or 0),
        tokens=tokens,
        outputs=tokens if chosen.embedding else chosen.slots,
        sequences=sequences,
        cells=chosen.cells,
        window_cells=(
            model._window_cells(chosen.slots if chosen.unified else 1) if any(layer.window for layer in layers) else 0
        ),
        flash=chosen.flash_attention,
        rotated=(turned[0] and key % 64 == 0, turned[1] and value % 64 == 0),
        cache_on_host=not chosen.kv_offload,
        output_device=_numbers(shape, chosen, devices)[-1],
        layers=_shortened(layers),
        experts=int(shape["expert_count"] or 0),
        used=int(shape["expert_used_count"] or 0),
        expert_forward=expert_forward,
        merged=family.kind == "gemma4",
        shared_forward=shared if family.kind != "gemma4" else 0,
        positions=4 if "vl" in architecture or architecture.startswith("qwen35") else 1,
        latent=(
            number("attention.q_lora_rank"),
            rank,
            key - rank,
            number("attention.key_length_mla"),
            number("attention.value_length_mla"),
        ),
        state=(
            number("ssm.inner_size"),
            number("ssm.state_size"),
            number("ssm.group_count"),
            number("ssm.time_step_rank"),
            number("ssm.conv_kernel"),
        ),
        indexer=(number("attention.indexer.head_count"), number("attention.indexer.key_length")),
        embedding=chosen.embedding,
        streams=chosen.streams,
        values_width=max((layer.kv_heads * layer.value for layer in layers), default=0),
    )


def _numbers(shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]]) -> list[int]:
    """Return the number of the device of each layer and of the output."""
    order = {device["id"]: index for index, device in enumerate(devices)}
    return [order.get(place, PROCESSOR) for place in places(layer_count(shape), chosen, devices)]


def _layers(
    shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]], family: Family, model: _Model
) -> list[Layer]:
    given = shape["hparams"]
    where = _numbers(shape, chosen, devices)
    forward = model._layers(given.get("feed_forward_length"))
    heads = model._layers(shape["head_count"])
    dense = int(given.get("leading_dense_block_count") or 0)
    result = []
    for index in range(model._trunk):
        window = model._sliding[index]
        key, value = int(shape["key_length"] or 0), int(shape["value_length"] or 0)
        if window:
            key = int(given.get("attention.key_length_swa") or key)
            value = int(given.get("attention.value_length_swa") or value)
        result.append(
            Layer(
                device=where[index],
                experts_device=PROCESSOR if index < chosen.moe_on_cpu else where[index],
                forward_device=PROCESSOR if index < chosen.ffn_on_cpu else where[index],
                heads=heads[index],
                kv_heads=model._heads[index],
                key=key,
                value=value,
                forward=forward[index],
                experts=bool(shape["expert_count"]) and index >= dense,
                window=window,
                recurrent=model._recurrent[index],
                own_values=window or family.kind != "gemma4",
            )
        )
    return result


def _shortened(layers: list[Layer]) -> tuple[Layer, ...]:
    """Leave out what only repeats: after some like layers, or groups of layers, one more needs no further room."""
    result: list[Layer] = []
    index = 0
    while index < len(layers):
        for period in PERIODS:
            group = layers[index : index + period]
            kept = max(KEPT, -(-KEPT_LAYERS // period)) if period > 1 else KEPT_LAYERS
            if group * kept == result[-period * kept :] and len(group) == period:
                index += period
                break
        else:
            result.append(layers[index])
            index += 1
    return tuple(result)
