# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many bytes of a model's weights lie where (load_tensors in src/llama-model.cpp of llama.cpp 0.7.0).

The token table stays on the processor, a tied output is a second copy of it beside the output layer. Experts that are
kept on the processor move their weights alone: the rest of their layer, and its cache, stay where they are.
"""

from __future__ import annotations

import re
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST, layer_count, places
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import Settings, settings

# Which types a processor keeps in another order: x86 with AVX2, and Arm with its dot products (ggml-cpu/repack.cpp).
REORDERED = {
    "x86_64": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "aarch64": ("Q1_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"),
}
# Devices without pinned host memory of their own; beside others, weights on the processor stay as they are in the file.
WITHOUT_HOST_BUFFER = frozenset(("emulated", "apple"))
# They need no output, or take the token table itself for it.
WITHOUT_OUTPUT = frozenset(
    (
        "bert",
        "bitnet",
        "eurobert",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    )
)
# The engine makes their tied output before the token table, and does not see that the two are one.
TWICE = frozenset(("gemma3n", "gemma4"))
# Names that stand for the tensors of a part, where an owner says by name what lies where.
NAMES = {
    "experts": ("blk.{}.ffn_up_exps.weight", "blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_down_exps.weight"),
    "feed_forward": ("blk.{}.ffn_up.weight", "blk.{}.ffn_gate.weight", "blk.{}.ffn_down.weight"),
    "blocks": ("blk.{}.attn_q.weight", "blk.{}.attn_output.weight", "blk.{}.attn_norm.weight"),
    "output": ("output.weight", "output_norm.weight"),
    "embedding": ("token_embd.weight",),
}
# Its layers after the last are no predictions of further tokens: they belong to the model.
ROUTER = "graniteswitch"


def weights(
    shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]], machine: str | None = None
) -> list[dict[str, Any]]:
    """Return a part for each place that holds weights; what the processor reorders is P(repacked) and not in it."""
    chosen = settings(options, shape)
    sizes = dict.fromkeys([*(device["id"] for device in devices), HOST], 0)
    pieces = _pieces(shape, chosen, devices)
    for where, part, index, size in pieces:
        sizes[where] += size
        if where == HOST and part != "embedding":
            sizes[HOST] -= _reordered(shape, chosen, devices, machine, part, index)
    # A part that is in two places at once is counted in both.
    source = "computed" if len({piece[1:3] for piece in pieces}) == len(pieces) else "bound"
    return [
        {"where": where, "kind": "weights", "bytes": size, "source": source} for where, size in sizes.items() if size
    ]


def repacked(
    shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]], machine: str | None = None
) -> int:
    """Return how many bytes of the weights on the processor it keeps in another order, outside the file.

    With memory-mapped files their pages in the file were read, too, and stay until something else needs the room.
    """
    chosen = settings(options, shape)
    return sum(
        _reordered(shape, chosen, devices, machine, part, index)
        for where, part, index, _size in _pieces(shape, chosen, devices)
        if where == HOST
    )


def _reordered(
    shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]], machine: str | None, part: str, index: int
) -> int:
    vendors = {device.get("vendor") for device in devices}
    if not chosen.repack or not vendors <= WITHOUT_HOST_BUFFER:
        return 0
    machine = machine or ("aarch64" if "apple" in vendors else "x86_64")
    total = 0
    for name in REORDERED.get(machine, ()):
        size = shape.get("repack_bytes", {}).get(name, {}).get(part, 0)
        total += (size[index] if index < len(size) else 0) if isinstance(size, list) else size
    return total


def _pieces(shape: dict[str, Any], chosen: Settings, devices: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    """Return where, which part, of which layer, bytes."""
    layers = layer_count(shape)
    where = places(layers, chosen, devices)
    pieces = [
        (HOST, "input", 0, shape["input_bytes"]),
        (where[0], "other", 0, shape["other_bytes"]),
        (where[-1], "output", 0, shape["output_bytes"]),
    ]
    if shape["tied_output"] and shape["architecture"] not in WITHOUT_OUTPUT:
        # On the processor the output is the table itself, unless it is kept in another order. Two maps of one part of
        # a file are the same memory.
        second = where[-1] != HOST or (shape["architecture"] in TWICE and not chosen.mmap)
        pieces.append((where[-1], "embedding", 0, shape.get("embedding_bytes", shape["input_bytes"]) if second else 0))
    experts, dense = shape["expert_bytes"], shape.get("ffn_bytes", [])
    for index, size in enumerate(shape["block_bytes"][: loaded(shape, chosen.further)]):
        moved = experts[index] if index < len(experts) else 0
        feed_forward = dense[index] if index < len(dense) else 0
        own = where[min(index, layers)]
        pieces.append((own, "blocks", index, size - moved - feed_forward))
        pieces.append((HOST if index < chosen.moe_on_cpu else own, "experts", index, moved))
        pieces.append((HOST if index < chosen.ffn_on_cpu else own, "feed_forward", index, feed_forward))
    if not chosen.overrides:
        return pieces
    return [moved for piece in pieces for moved in _overridden(piece, chosen, devices)]


def _overridden(
    piece: tuple[str, str, int, int], chosen: Settings, devices: list[dict[str, Any]]
) -> list[tuple[str, str, int, int]]:
    """Return the piece wherever tensors of it go: the engine looks for the first pattern in each tensor's name."""
    where, part, index, size = piece
    found = []
    for name in NAMES.get(part, ("",)) if size else ("",):
        place = where
        buffer = next((buffer for pattern, buffer in chosen.overrides if _in(pattern, name.format(index))), None)
        if name and buffer:
            number = re.search(r"\d+$", buffer)
            inside = number and buffer[: number.start()] != "CPU" and int(number[0]) < len(devices)
            place = devices[int(number[0])]["id"] if number and inside else HOST
        # The table itself is on the processor already.
        moved = (place, part, index, 0 if part == "embedding" and place == HOST != where else size)
        if moved not in found:
            found.append(moved)
    return found


def _in(pattern: str, name: str) -> bool:
    try:
        return bool(re.search(pattern, name))
    except re.error:
        return False


def loaded(shape: dict[str, Any], all_of_them: bool = False) -> int:
    """Return how many layers a server loads: those that predict further tokens are passed over unless asked for."""
    layers = int(shape["block_count"] or 0)
    further = shape["hparams"].get("nextn_predict_layers") or 0
    if not isinstance(further, int) or further >= layers or all_of_them or shape["architecture"] == ROUTER:
        return layers
    return layers - further
