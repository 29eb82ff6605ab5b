# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What llama-server makes of its options: its own defaults and roundings, as far as memory depends on them.

The rules are those of llama.cpp 0.7.0 (tools/server/server.cpp, src/llama-context.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIB = 1 << 20
# More layers than any model has; what "all", "auto" and -1 mean.
ALL_LAYERS = 1 << 20
# Bytes of a block and elements in it, for each type that a KV cache may have (ggml's block layouts, ggml-common.h).
CACHE_TYPES = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}
SAME = {
    "gpu-layers": "n-gpu-layers",
    "embeddings": "embedding",
    "rerank": "reranking",
    "cache-type-k-draft": "spec-draft-type-k",
    "cache-type-v-draft": "spec-draft-type-v",
    "swa-checkpoints": "ctx-checkpoints",
}
# Kinds of speculative decoding that drop some of the tokens that they tried.
ROLLING_BACK = frozenset(("draft-mtp", "draft-eagle3", "draft-dflash", "draft-dspark"))
OFF = ("off", "none", "disabled", "false", "0")


@dataclass(frozen=True)
class Settings:
    """Numbers only, and as the server uses them: padded, limited, defaults filled in."""

    context: int  # tokens of all slots together
    slots: int
    unified: bool
    streams: int  # KV caches beside each other: 1 when unified, else one for each slot
    cells: int  # tokens of one stream
    batch: int
    ubatch: int
    flash_attention: bool
    type_k: str
    type_v: str
    swa_full: bool
    gpu_layers: int  # counts the output layer; ALL_LAYERS for all
    split: tuple[float, ...]  # empty: by the memory of the devices
    split_mode: str
    main_gpu: int
    moe_on_cpu: int  # the experts of so many first layers stay on the processor
    ffn_on_cpu: int  # the same for the other feed-forward weights
    overrides: tuple[tuple[str, str], ...]  # pattern of tensors' names, and the buffer that they go to
    kv_offload: bool
    op_offload: bool
    mmap: bool
    repack: bool
    cache_ram_mib: int  # -1: no limit
    checkpoints: int
    embedding: bool
    further: bool  # layers that predict further tokens are loaded, and have a context of their own
    further_type_k: str
    further_type_v: str
    rollback: int  # tokens that a recurrent state can be taken back by, each with a copy of it


def row_bytes(kv_type: str, elements: int) -> int:
    """Return the bytes of a row in a KV cache of that type."""
    size, block = CACHE_TYPES[kv_type]
    return elements * size // block


def pad(number: int, multiple: int = 256) -> int:
    """Return the next multiple; contexts and caches come in multiples of 256 tokens."""
    return -(-number // multiple) * multiple


def settings(options: dict[str, Any], shape: dict[str, Any]) -> Settings:
    """Return what the server makes of C(options), which are its long options without dashes, for a model."""
    given = _plain(options)

    def whole(name: str, default: int) -> int:
        value = given.get(name)
        return default if value is None else int(value)

    def on(name: str, default: bool) -> bool:
        value = given.get(name)
        if isinstance(value, str):
            return value.lower() not in OFF
        return default if value is None else bool(value)

    slots = whole("parallel", -1)
    unified = on("kv-unified", False) or slots < 0
    slots = max(1, slots) if slots >= 0 else 4
    wanted = whole("ctx-size", 0) or int(shape.get("context_length") or 0)
    context = pad(wanted)
    cells = context if unified else pad(context // slots)
    kinds = given.get("spec-type") or "none"
    speculative = set(kinds if isinstance(kinds, list) else str(kinds).split(","))
    embedding = on("embedding", False) or on("reranking", False)
    batch, ubatch = whole("batch-size", 2048), whole("ubatch-size", 512)
    if embedding:
        batch = min(batch, ubatch)
    if causal(shape, given.get("attention")):
        batch = min(batch, wanted)
    ubatch = min(batch, ubatch or batch)
    return Settings(
        context=cells if unified else cells * slots,
        slots=slots,
        unified=unified,
        streams=1 if unified else slots,
        cells=cells,
        batch=batch,
        ubatch=ubatch,
        # The engine itself turns it off for this one architecture (llama_init_from_model).
        flash_attention=on("flash-attn", True) and shape.get("architecture") != "grok",
        type_k=str(given.get("cache-type-k") or "f16").lower(),
        type_v=str(given.get("cache-type-v") or "f16").lower(),
        swa_full=on("swa-full", False),
        gpu_layers=_layers(given.get("n-gpu-layers")),
        split=_numbers(given.get("tensor-split")),
        split_mode=str(given.get("split-mode") or "layer"),
        main_gpu=whole("main-gpu", 0),
        moe_on_cpu=ALL_LAYERS if on("cpu-moe", False) else whole("n-cpu-moe", 0),
        ffn_on_cpu=whole("n-cpu-ffn", 0),
        overrides=_overrides(given.get("override-tensor")),
        kv_offload=on("kv-offload", True),
        op_offload=on("op-offload", True),
        mmap=on("mmap", True) and str(given.get("load-mode") or "auto") in ("auto", "mmap", "mmap+mlock"),
        repack=on("repack", True),
        cache_ram_mib=whole("cache-ram", 8192),
        checkpoints=whole("ctx-checkpoints", 32),
        embedding=embedding,
        further="draft-mtp" in speculative,
        further_type_k=str(given.get("spec-draft-type-k") or "f16").lower(),
        further_type_v=str(given.get("spec-draft-type-v") or "f16").lower(),
        rollback=whole("spec-draft-n-max", 3) if speculative & ROLLING_BACK else 0,
    )


def causal(shape: dict[str, Any], attention: Any = None) -> bool:
    """Return whether a token sees only those before it; else a batch may be larger than the context."""
    if attention in ("causal", "non-causal"):
        return bool(attention == "causal")
    return bool(shape.get("hparams", {}).get("attention.causal", True))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options under one name each; an owner may have written C(no-mmap: true)."""
    result = {}
    for written, value in options.items():
        name = written
        if name.startswith("no-") and isinstance(value, bool):
            name, value = name[3:], not value
        result[SAME.get(name, name)] = value
    return result


def _layers(value: Any) -> int:
    if value is None or value in ("all", "auto"):
        return ALL_LAYERS
    return ALL_LAYERS if int(value) < 0 else int(value)


def _overrides(value: Any) -> tuple[tuple[str, str], ...]:
    parts = value if isinstance(value, (list, tuple)) else str(value or "").split(",")
    pairs = [str(part).rpartition("=") for part in parts if part]
    return tuple((pattern, buffer) for pattern, _equals, buffer in pairs)


def _numbers(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    parts = value.replace("/", ",").split(",") if isinstance(value, str) else value
    numbers = tuple(float(part) for part in parts) if isinstance(parts, (list, tuple)) else (float(parts),)
    return numbers if any(numbers) else ()
