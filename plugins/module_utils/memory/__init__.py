# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much memory a model server takes, from the header of its file: an estimate, rather too high than too low."""

from __future__ import annotations

from typing import Any

MIB = 2**20
# Bytes per element of each KV type: block size in bytes / elements per block (ggml's block layouts, ggml-common.h).
KV_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
# Compute buffers and what the driver takes per process. CUDA contexts measure 451-456 MiB (llama.cpp issue 15860); the
# graph of an 8B model at ubatch 512 and 16k context is 132 MiB, of larger ones up to a few hundred.
GPU_OVERHEAD_MIB = 456 + 400
HOST_OVERHEAD_MIB = 64
EMULATED_OVERHEAD_MIB = 64


def kv_mib(shape: dict[str, Any], context: int, slots: int, kv: str) -> float:
    """Return the size of the KV cache in MiB for C(slots) requests of C(context) tokens.

    Every layer is counted with the full context: for models with sliding windows or recurrent layers this is an upper
    bound.
    """
    layers = int(shape.get("block_count") or 0)
    heads = shape.get("head_count_kv") or shape.get("head_count") or 0
    per_layer = [int(one) for one in heads] if isinstance(heads, list) else [int(heads)] * layers
    row = int(shape.get("key_length") or 0) + int(shape.get("value_length") or 0)
    cells = -(-context // 256) * 256 * slots
    return sum(per_layer) * row * cells * KV_BYTES[kv] / MIB


def estimate(
    shape: dict[str, Any], file_bytes: int, context: int, slots: int, kv: str, overhead_mib: int
) -> dict[str, int]:
    """Return C({weights, kv, overhead, total}) in MiB of one server, wherever its layers lie."""
    weights = -(-file_bytes // MIB)
    cache = int(kv_mib(shape, context, slots, kv)) + 1
    return {"weights": weights, "kv": cache, "overhead": overhead_mib, "total": weights + cache + overhead_mib}
