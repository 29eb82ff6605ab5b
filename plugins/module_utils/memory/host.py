# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server takes besides weights, caches and buffers: of main memory, and of each device that it opens.

What counts against a container's limit is what cannot be given back: anonymous memory, and the pages of files that are
needed again and again. Pages of the model that were read once, because its weights lie elsewhere by now, are given back
as soon as room is short: they are in no part.

Measured (tests/integration/test_memory_host.py prints the table): with reordered weights a server lives as long as its
anonymous memory, its page tables and about 4 MiB of its program fit, and is killed below. With weights in the file it
is not killed, but reads from the disk with each token what is missing; so these are counted in full. Of a token table
that is not the output as well only the rows asked for are needed; it is counted in full, too, so that a limit leaves
room for prompts of any words.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import _Model, cache
from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST, layer_devices
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import MIB, Settings, settings
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import repacked

# MiB that a process takes of each device it opens, beside the buffers that its log names: driver context, kernels,
# library workspaces.
DEVICE_OVERHEAD_MIB = {
    "cuda": 456,  # 451 to 456 on an RTX 4090 (llama.cpp issue 15860); Ollama counts 457
    "rocm": 300,  # not measured; a start value until the first server was read back
    "vulkan": 300,  # likewise
    "sycl": 300,  # likewise
    "metal": 512,  # Ollama's value
    # Measured with ggml-rpc-server of 0.7.0: 3.3 of its own, 5.8 of mapped program. The rest: with_device_process.
    "emulated": 9,
    "cpu": 0,
}
# MiB of main memory that the libraries of a backend keep in each process, beside the server's own.
BACKEND_BASE_MIB = {
    "cuda": 256,  # not measured
    "rocm": 256,  # not measured
    "vulkan": 80,  # 35 to 80 with Mesa's drivers
    "sycl": 256,  # not measured
    "metal": 64,  # not measured
    "emulated": 0,  # measured: as without devices
    "cpu": 0,
}
# A server of its own, measured with llama-server 0.7.0 on x86: what it allocates for itself, its threads and the work
# of its matrix products; program text and libraries, mapped; a page table's entry for each page of 4 KiB; and the
# vocabulary, in bytes for each token and for each merge of two.
BASE_MIB = 9
PROGRAM_MIB = 18
PAGE_TABLE_SHARE = 512
TOKEN_BYTES = 176
MERGE_BYTES = 132
READ_AHEAD_SHARE, LEAST_READ_AHEAD_MIB = 50, 2
# Blocks up to this size stay in the heap of the GNU C library (DEFAULT_MMAP_THRESHOLD_MAX).
HEAP_MIB = 32
# The most that the process behind an emulated device was seen to work in, beside the buffer it was asked for.
WORK_MIB = 8
# Bytes for each node of a graph, in the tables that a server fills with zeroes: a graph's own, of which it holds two
# (measured: 423 each), and the scheduler's. How many nodes there may be follows llama_context::graph_max_nodes of
# llama.cpp 0.5.0: (for each token of a batch, for each tensor), and never fewer than 1024.
NODE_BYTES = 1100
LEAST_NODES = 1024
NODES = (0, 8)
MANY_NODES = {
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe", "qwen4exp", "kimi-linear", "bailingmoe3"), (40, 32)),
    **dict.fromkeys(("deepseek4", "nanbeige", "minimax-01", "minimax-m3", "hy_v4"), (40, 32)),
    **dict.fromkeys(("kimi-k3", "glm5-next"), (160, 64)),
    "hrm_text": (80, 64),
}


def host(
    shape: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    backend: str,
    overheads: dict[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return the parts of kind repack, mapped, prompt_cache, base and overhead.

    :param overheads: MiB that servers were seen to take of a device beside their buffers, by id or by backend.
    """
    chosen = settings(options, shape)
    machine = "aarch64" if any(device.get("vendor") in ("apple", "tegra") for device in devices) else "x86_64"
    learned = overheads or {}
    found = []
    for device in devices:
        size = learned.get(device["id"], learned.get(backend))
        source = "bound" if size is None else "measured"
        size = DEVICE_OVERHEAD_MIB.get(backend, max(DEVICE_OVERHEAD_MIB.values())) if size is None else size
        found.append(_part(device["id"], "overhead", size * MIB, source))
    base = BASE_MIB + BACKEND_BASE_MIB.get(backend, max(BACKEND_BASE_MIB.values()))
    found += [
        _part(HOST, "repack", repacked(shape, options, devices, machine), "computed"),
        _part(HOST, "prompt_cache", prompt_cache(shape, options, chosen), "bound"),
        _part(HOST, "mapped", PROGRAM_MIB * MIB, "bound"),
        _part(HOST, "base", base * MIB + vocabulary(shape) + tables(shape, chosen), "bound"),
    ]
    return [part for part in found if part["bytes"]]


def tables(shape: dict[str, Any], chosen: Settings) -> int:
    """Return what the tables of the largest graph take, beside those of the small one that every server has."""
    by_token, by_tensor = MANY_NODES.get(shape["architecture"], NODES)
    nodes = max(LEAST_NODES, by_token * chosen.ubatch, by_tensor * int(shape.get("tensor_count") or 0))
    return NODE_BYTES * (nodes - LEAST_NODES)


def with_uploads(parts: list[dict[str, Any]], shape: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    """Return the parts with the copy that a server makes of a tensor before it sends it to another process.

    It is made before compute buffers are, so what is larger than those counts; and a copy of up to 32 MiB is not given
    back whole, because it lies in the heap. (Measured: 15.6 MiB for an output of 15.6 MiB, and 8.5 MiB that stayed of
    experts of 18 to 26 MiB.)
    """
    if backend != "emulated":
        return parts
    # Of experts and feed-forward there are three tensors in a layer, of experts at times two merged into one.
    largest = max(
        shape["output_bytes"],
        shape.get("embedding_bytes", shape["input_bytes"]) if shape["tied_output"] else 0,
        *(size * 2 // 3 for size in shape["expert_bytes"]),
        *(-(-size // 3) for size in shape.get("ffn_bytes", [])),
    )
    later = _sums(parts, "compute", "output").get(HOST, 0)
    return [
        {**part, "bytes": part["bytes"] + max(largest - later, min(largest, HEAP_MIB * MIB) // 2)}
        if part["where"] == HOST and part["kind"] == "base"
        else part
        for part in parts
    ]


def with_device_process(
    parts: list[dict[str, Any]],
    shape: dict[str, Any],
    options: dict[str, Any],
    devices: list[dict[str, Any]],
    backend: str,
) -> list[dict[str, Any]]:
    """Return the parts with what the process behind an emulated device works in, and what arrives there (staging).

    It brings the rows that it multiplies into the weights' type: at most two of the four bytes of each, of rows that
    the compute buffer holds twice. A tensor is held twice until it is put away. The output comes first, then layer by
    layer, and caches and buffers after all of them; so the most is held with the output twice, or with all weights and
    one of a layer's tensors once more. (Measured: a device of 163 MiB for 123 MiB of weights with a large table was
    killed while it loaded; one with an output of 51 MiB among 70 took 86 MiB.)
    """
    if backend != "emulated" or not devices:
        return parts
    where, on_cpu = layer_devices(shape, options, devices), settings(options, shape).moe_on_cpu
    last: dict[str, int] = {}
    for index, (place, experts) in enumerate(zip(where, shape["expert_bytes"])):
        ffn = [*shape.get("ffn_bytes", []), *[0] * (index + 1)][index]
        last[place] = max(last.get(place, 0), experts * 2 // 3 if index >= on_cpu else 0, -(-ffn // 3))
    first = {where[-1]: 2 * max(shape["output_bytes"], shape.get("embedding_bytes", 0) if shape["tied_output"] else 0)}
    loaded = _sums(parts, "weights")
    computing = _sums(parts, "compute")
    later = _sums(parts, "kv", "recurrent", "compute")

    def work(place: str) -> int:
        return min(computing.get(place, 0) // 2, WORK_MIB * MIB)

    def arriving(place: str) -> int:
        there = loaded.get(place, 0)
        return max(0, max(there + last.get(place, 0), first.get(place, 0)) - there - later.get(place, 0))

    return [
        *({**one, "bytes": one["bytes"] + work(one["where"])} if one["kind"] == "overhead" else one for one in parts),
        *(_part(place, "staging", arriving(place), "bound") for place in loaded if arriving(place) and place != HOST),
    ]


def _sums(parts: list[dict[str, Any]], *kinds: str) -> dict[str, int]:
    """Return the bytes of parts of these kinds, by place."""
    found: dict[str, int] = {}
    for part in parts:
        if part["kind"] in kinds:
            found[part["where"]] = found.get(part["where"], 0) + part["bytes"]
    return found


def with_page_tables(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts with what the kernel keeps to map them; reordered weights were mapped in the file, too."""
    mapped = sum(part["bytes"] * (1 + (part["kind"] == "repack")) for part in parts if part["where"] == HOST)
    return [
        {**part, "bytes": part["bytes"] + mapped // PAGE_TABLE_SHARE} if part["kind"] == "base" else part
        for part in parts
    ]


def with_read_ahead(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts with room for the kernel to read ahead, where weights were kept in another order.

    The pages of the file that are still needed are few there, and without room beside them they push each other out: a
    server of 237 MiB limited to 241 read 14 GB from the disk for one prompt, and none with a few MiB more.
    """
    if not any(part["kind"] == "repack" for part in parts):
        return parts
    whole = sum(part["bytes"] for part in parts if part["where"] == HOST)
    more = max(whole // READ_AHEAD_SHARE, LEAST_READ_AHEAD_MIB * MIB)
    return [
        {**part, "bytes": part["bytes"] + more} if part["where"] == HOST and part["kind"] == "base" else part
        for part in parts
    ]


def prompt_cache(shape: dict[str, Any], options: dict[str, Any], chosen: Settings) -> int:
    """Return the most that kept prompts and checkpoints of contexts can come to.

    The limit of the prompt cache is looked at after a prompt was added, so it can be passed by one.
    """
    kept = chosen.slots * chosen.checkpoints * checkpoint(shape, chosen)
    limit = chosen.cache_ram_mib if chosen.cache_ram_mib >= 0 else 8192
    if limit:
        whole = sum(part["bytes"] for part in cache(shape, options, []))
        kept += limit * MIB + whole // chosen.slots
    return kept


def checkpoint(shape: dict[str, Any], chosen: Settings) -> int:
    """Return the bytes of one checkpoint: of a slot's cache what cannot be rolled back, windows and states.

    Of a window's cache those tokens are kept that the window still shows, not what a batch needs beside them.
    """
    model = _Model(shape, replace(chosen, slots=1, streams=1))
    cells = model._window_cells(1) if any(model._sliding) else 1
    shown = cells if model._name == "deepseek4" else min(model._window, cells)
    total = 0
    for window, (kv, state) in zip(model._sliding, model.sizes()):
        total += state
        if window and not chosen.swa_full:
            total += kv * shown // cells
    return total


def vocabulary(shape: dict[str, Any]) -> int:
    """Return what the tables of a vocabulary take in memory."""
    tokens = int(shape.get("vocab_size") or 0)
    # Byte pairs: as many merges as tokens (Qwen) or twice as many (Llama 3, gpt-oss).
    merges = 2 * tokens if shape.get("tokenizer") == "gpt2" else 0
    return tokens * TOKEN_BYTES + merges * MERGE_BYTES


def _part(where: str, kind: str, size: int, source: str) -> dict[str, Any]:
    return {"where": where, "kind": kind, "bytes": size, "source": source}
