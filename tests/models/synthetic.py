# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes GGUF files that have the shape of well-known models and none of their weights.

    python3 tests/models/synthetic.py DIRECTORY [NAME[:QUANT]...]

Names, shapes and types of all tensors are those of the published model after llama.cpp's converter and quantiser; the
sizes of the published files are met within a few per mille. Tensor data is a hole in a sparse file: a model of 400 GB
takes a few MiB of disk. Bind-mount such files read-only; copies and Docker's build context fill the holes with zeros.
The vocabulary has the true length and invented tokens. Every file is called synthetic_*.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy

T = gguf.GGMLQuantizationType
F = gguf.LlamaFileType
HUB = "https://huggingface.co"

# Published quantisations: number in general.file_type, and the type of most tensors.
QUANTS = {
    "F16": (F.MOSTLY_F16, T.F16),
    "BF16": (F.MOSTLY_BF16, T.BF16),
    "Q8_0": (F.MOSTLY_Q8_0, T.Q8_0),
    "Q6_K": (F.MOSTLY_Q6_K, T.Q6_K),
    "Q5_K_M": (F.MOSTLY_Q5_K_M, T.Q5_K),
    "Q5_K_S": (F.MOSTLY_Q5_K_S, T.Q5_K),
    "Q4_K_M": (F.MOSTLY_Q4_K_M, T.Q4_K),
    "Q4_K_S": (F.MOSTLY_Q4_K_S, T.Q4_K),
    "Q4_0": (F.MOSTLY_Q4_0, T.Q4_0),
    "Q4_1": (F.MOSTLY_Q4_1, T.Q4_1),
    "IQ4_XS": (F.MOSTLY_IQ4_XS, T.IQ4_XS),
    "Q3_K_M": (F.MOSTLY_Q3_K_M, T.Q3_K),
    "IQ3_M": (F.MOSTLY_IQ3_M, T.IQ3_S),
    "Q2_K": (F.MOSTLY_Q2_K, T.Q2_K),
    "MXFP4": (F.MOSTLY_MXFP4_MOE, T.MXFP4),
}
# What the quantiser takes where a row cannot be cut into blocks of 256.
FALLBACK = {
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
}

Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Model:
    """One published model: where its numbers stand, its metadata, and how its tensors follow from that."""

    source: str
    architecture: str
    label: str
    quants: tuple[str, ...]
    vocabulary: int
    values: dict[str, Any]
    tensors: Callable[[Model], Tensors]
    tied: bool = False
    tokenizer: str = "llama"
    extra: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def layers(self) -> int:
        return int(self["block_count"])

    @property
    def width(self) -> int:
        return int(self["embedding_length"])

    @property
    def heads(self) -> int:
        return int(self["attention.head_count"])

    @property
    def kv_heads(self) -> int:
        return int(self["attention.head_count_kv"])

    @property
    def head(self) -> int:
        return int(self.values.get("attention.key_length", self.width // self.heads))


def _outside(model: Model) -> Tensors:
    yield "token_embd.weight", (model.width, model.vocabulary)
    yield "output_norm.weight", (model.width,)
    if not model.tied:
        yield "output.weight", (model.width, model.vocabulary)


def _attention(model: Model, block: str, queries: int = 1) -> Tensors:
    """Grouped attention; a gated one has twice the queries."""
    width, rows, kv_rows = model.width, model.heads * model.head, model.kv_heads * model.head
    yield f"{block}.attn_norm.weight", (width,)
    yield f"{block}.attn_q.weight", (width, rows * queries)
    yield f"{block}.attn_k.weight", (width, kv_rows)
    yield f"{block}.attn_v.weight", (width, kv_rows)
    yield f"{block}.attn_output.weight", (rows, width)
    if "bias" in model.extra:
        yield f"{block}.attn_q.bias", (rows * queries,)
        yield f"{block}.attn_k.bias", (kv_rows,)
        yield f"{block}.attn_v.bias", (kv_rows,)
    if "qk_norm" in model.extra:
        yield f"{block}.attn_q_norm.weight", (model.head,)
        yield f"{block}.attn_k_norm.weight", (model.head,)


def _feed_forward(model: Model, block: str, suffix: str = "", length: int = 0) -> Tensors:
    width, length = model.width, length or int(model["feed_forward_length"])
    yield f"{block}.ffn_gate{suffix}.weight", (width, length)
    yield f"{block}.ffn_up{suffix}.weight", (width, length)
    yield f"{block}.ffn_down{suffix}.weight", (length, width)


def _experts(model: Model, block: str) -> Tensors:
    width, length, count = model.width, int(model["expert_feed_forward_length"]), int(model["expert_count"])
    yield f"{block}.ffn_gate_inp.weight", (width, count)
    yield f"{block}.ffn_gate_exps.weight", (width, length, count)
    yield f"{block}.ffn_up_exps.weight", (width, length, count)
    yield f"{block}.ffn_down_exps.weight", (length, width, count)


def dense(model: Model) -> Tensors:
    """Llama and its kin: qwen2, qwen2vl, qwen3, gemma3."""
    yield from _outside(model)
    if "rope_freqs" in model.extra:
        yield "rope_freqs.weight", (model.head // 2,)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield from _attention(model, block)
        yield f"{block}.ffn_norm.weight", (model.width,)
        yield from _feed_forward(model, block)
        if "post_norms" in model.extra:
            yield f"{block}.post_attention_norm.weight", (model.width,)
            yield f"{block}.post_ffw_norm.weight", (model.width,)


def sparse(model: Model) -> Tensors:
    """Experts in every layer, as qwen3moe has them."""
    yield from _outside(model)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield from _attention(model, block)
        yield f"{block}.ffn_norm.weight", (model.width,)
        yield from _experts(model, block)


def gpt_oss(model: Model) -> Tensors:
    """Sinks, and a bias on everything."""
    width, length, count = model.width, int(model["expert_feed_forward_length"]), int(model["expert_count"])
    yield from _outside(model)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield from _attention(model, block)
        yield f"{block}.attn_output.bias", (width,)
        yield f"{block}.attn_sinks.weight", (model.heads,)
        yield f"{block}.post_attention_norm.weight", (width,)
        yield from _experts(model, block)
        yield f"{block}.ffn_gate_inp.bias", (count,)
        yield f"{block}.ffn_gate_exps.bias", (length, count)
        yield f"{block}.ffn_up_exps.bias", (length, count)
        yield f"{block}.ffn_down_exps.bias", (width, count)


def deepseek(model: Model) -> Tensors:
    """Multi-head latent attention; the first layers are dense."""
    width, heads = model.width, model.heads
    query, latent, rope = (
        int(model[key]) for key in ("attention.q_lora_rank", "attention.kv_lora_rank", "rope.dimension_count")
    )
    key, value = int(model["attention.key_length_mla"]), int(model["attention.value_length_mla"])
    yield from _outside(model)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (width,)
        yield f"{block}.attn_q_a.weight", (width, query)
        yield f"{block}.attn_q_a_norm.weight", (query,)
        yield f"{block}.attn_q_b.weight", (query, heads * key)
        yield f"{block}.attn_kv_a_mqa.weight", (width, latent + rope)
        yield f"{block}.attn_kv_a_norm.weight", (latent,)
        yield f"{block}.attn_k_b.weight", (key - rope, latent, heads)
        yield f"{block}.attn_v_b.weight", (latent, value, heads)
        yield f"{block}.attn_output.weight", (heads * value, width)
        yield f"{block}.ffn_norm.weight", (width,)
        if layer < model["leading_dense_block_count"]:
            yield from _feed_forward(model, block)
        else:
            yield from _experts(model, block)
            yield f"{block}.exp_probs_b.bias", (int(model["expert_count"]),)
            yield from _feed_forward(model, block, "_shexp", int(model["expert_feed_forward_length"]))


def glm(model: Model) -> Tensors:
    """GLM 4.5: the first layer is dense, the last one predicts the token after next."""
    yield from _outside(model)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield from _attention(model, block)
        yield f"{block}.post_attention_norm.weight", (model.width,)
        if layer < model["leading_dense_block_count"]:
            yield from _feed_forward(model, block)
        else:
            yield from _experts(model, block)
            yield f"{block}.exp_probs_b.bias", (int(model["expert_count"]),)
            yield from _feed_forward(model, block, "_shexp", int(model["expert_feed_forward_length"]))
    yield f"{block}.nextn.eh_proj.weight", (2 * model.width, model.width)
    yield f"{block}.nextn.embed_tokens.weight", (model.width, model.vocabulary)
    yield f"{block}.nextn.shared_head_head.weight", (model.width, model.vocabulary)
    for norm in ("enorm", "hnorm", "shared_head_norm"):
        yield f"{block}.nextn.{norm}.weight", (model.width,)


def hybrid(model: Model) -> Tensors:
    """Gated delta net with full attention in every fourth layer: qwen3next and qwen35moe."""
    width = model.width
    state, groups, rank, kernel, inner = (
        int(model[f"ssm.{key}"]) for key in ("state_size", "group_count", "time_step_rank", "conv_kernel", "inner_size")
    )
    mixed = 2 * state * groups + inner
    yield from _outside(model)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        if (layer + 1) % int(model["full_attention_interval"]) == 0:
            yield from _attention(model, block, queries=2)
        else:
            yield f"{block}.attn_norm.weight", (width,)
            yield f"{block}.attn_qkv.weight", (width, mixed)
            yield f"{block}.attn_gate.weight", (width, inner)
            yield f"{block}.ssm_conv1d.weight", (kernel, mixed)
            yield f"{block}.ssm_dt.bias", (rank,)
            yield f"{block}.ssm_a", (rank,)
            if model.architecture == "qwen3next":
                yield f"{block}.ssm_ba.weight", (width, 2 * rank)
            else:
                yield f"{block}.ssm_beta.weight", (width, rank)
                yield f"{block}.ssm_alpha.weight", (width, rank)
            yield f"{block}.ssm_norm.weight", (state,)
            yield f"{block}.ssm_out.weight", (inner, width)
        yield f"{block}.post_attention_norm.weight", (width,)
        yield from _experts(model, block)
        yield f"{block}.ffn_gate_inp_shexp.weight", (width,)
        yield from _feed_forward(model, block, "_shexp", int(model["expert_shared_feed_forward_length"]))


def gemma4(model: Model) -> Tensors:
    """Sliding layers, and a few global ones with other heads and without values; experts beside a dense part."""
    width, length, count = model.width, int(model["expert_feed_forward_length"]), int(model["expert_count"])
    yield from _outside(model)
    yield "rope_freqs.weight", (int(model["attention.key_length"]) // 2,)
    for layer, sliding in enumerate(model["attention.sliding_window_pattern"]):
        block = f"blk.{layer}"
        head = int(model["attention.key_length_swa" if sliding else "attention.key_length"])
        rows, kv_rows = model.heads * head, int(model["attention.head_count_kv"][layer]) * head
        yield f"{block}.attn_norm.weight", (width,)
        yield f"{block}.attn_q.weight", (width, rows)
        yield f"{block}.attn_k.weight", (width, kv_rows)
        if sliding:
            yield f"{block}.attn_v.weight", (width, kv_rows)
        yield f"{block}.attn_output.weight", (rows, width)
        yield f"{block}.attn_q_norm.weight", (head,)
        yield f"{block}.attn_k_norm.weight", (head,)
        yield f"{block}.ffn_gate_inp.weight", (width, count)
        yield f"{block}.ffn_gate_inp.scale", (width,)
        yield f"{block}.ffn_gate_up_exps.weight", (width, 2 * length, count)
        yield f"{block}.ffn_down_exps.weight", (length, width, count)
        yield f"{block}.ffn_down_exps.scale", (count,)
        yield from _feed_forward(model, block)
        yield f"{block}.layer_output_scale.weight", (1,)
        for norm in ("post_attention", "ffn", "post_ffw", "post_ffw_1", "pre_ffw_2", "post_ffw_2"):
            name = re.sub(r"(ffw)_(\d)$", r"\1_norm_\2", norm) if norm[-1].isdigit() else f"{norm}_norm"
            yield f"{block}.{name}.weight", (width,)


def phi(model: Model) -> Tensors:
    """Queries, keys and values in one tensor, gate and up in another."""
    width, length = model.width, int(model["feed_forward_length"])
    yield from _outside(model)
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (width,)
        yield f"{block}.attn_qkv.weight", (width, width + 2 * model.kv_heads * model.head)
        yield f"{block}.attn_output.weight", (width, width)
        yield f"{block}.ffn_norm.weight", (width,)
        yield f"{block}.ffn_up.weight", (width, 2 * length)
        yield f"{block}.ffn_down.weight", (length, width)


def nomic_bert(model: Model) -> Tensors:
    """An encoder."""
    width = model.width

    def norm(stem: str) -> Tensors:
        yield f"{stem}.weight", (width,)
        yield f"{stem}.bias", (width,)

    yield "token_embd.weight", (width, model.vocabulary)
    yield "token_types.weight", (width, 2)
    yield from norm("token_embd_norm")
    for layer in range(model.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_qkv.weight", (width, 3 * width)
        yield f"{block}.attn_output.weight", (width, width)
        yield from norm(f"{block}.attn_output_norm")
        yield from _feed_forward(model, block)
        yield from norm(f"{block}.layer_output_norm")


def vision(model: Model) -> Tensors:
    """A vision tower and what leads from it into the model's width."""
    width, length, patch = (model[f"vision.{key}"] for key in ("embedding_length", "feed_forward_length", "patch_size"))
    out, gated = model["vision.projection_dim"], "gated" in model.extra

    def pair(stem: str, *shape: int) -> Tensors:
        yield f"{stem}.weight", shape
        yield f"{stem}.bias", (shape[-1],)

    yield "v.patch_embd.weight", (patch, patch, 3, width)
    if gated:
        yield "v.patch_embd.weight.1", (patch, patch, 3, width)
    else:
        yield "v.patch_embd.bias", (width,)
        yield "v.position_embd.weight", (width, (model["vision.image_size"] // patch) ** 2)
    for layer in range(model["vision.block_count"]):
        block = f"v.blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from pair(f"{block}.{part}", width, width)
        yield from pair(f"{block}.ffn_up", width, length)
        if gated:
            yield from pair(f"{block}.ffn_gate", width, length)
        yield from pair(f"{block}.ffn_down", length, width)
        for norm in ("ln1", "ln2"):
            yield from ((f"{block}.{norm}.weight", (width,)),) if gated else pair(f"{block}.{norm}", width)
    if gated:
        merged = width * model["vision.spatial_merge_size"] ** 2
        yield "v.post_ln.weight", (width,)
        yield from pair("mm.0", merged, merged)
        yield from pair("mm.2", merged, out)
    else:
        yield from pair("v.post_ln", width)
        yield "mm.input_projection.weight", (out, width)
        yield "mm.soft_emb_norm.weight", (width,)


def _values(
    layers: int,
    width: int,
    forward: int,
    heads: int,
    kv_heads: int | list[int],
    context: int,
    head: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """Metadata that all have; in further names two underscores stand for a dot."""
    values: dict[str, Any] = {
        "context_length": context,
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": forward,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    if head:
        values |= {"attention.key_length": head, "attention.value_length": head}
    values |= {key.replace("__", "."): value for key, value in more.items()}
    values.setdefault("rope.dimension_count", head or width // heads)
    values.setdefault("rope.freq_base", 1e6)
    values.setdefault("attention.layer_norm_rms_epsilon", 1e-6)
    return values


def _moe(count: int, used: int, length: int, **more: Any) -> dict[str, Any]:
    return {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": length, **more}


LLAMA_8B = Model(
    f"{HUB}/meta-llama/Llama-3.1-8B-Instruct/blob/main/config.json",
    "llama",
    "8B",
    ("Q4_K_M", "Q8_0", "F16"),
    128256,
    _values(32, 4096, 14336, 32, 8, 131072, rope__freq_base=5e5),
    dense,
    extra=("rope_freqs",),
)
QWEN2_7B = Model(
    f"{HUB}/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json",
    "qwen2",
    "7B",
    ("Q4_K_M", "Q3_K_M", "Q8_0"),
    152064,
    _values(28, 3584, 18944, 28, 4, 32768),
    dense,
    extra=("bias",),
)
QWEN3_8B = Model(
    f"{HUB}/Qwen/Qwen3-8B/blob/main/config.json",
    "qwen3",
    "8B",
    ("Q4_K_M", "Q6_K", "Q8_0"),
    151936,
    _values(36, 4096, 12288, 32, 8, 40960, 128),
    dense,
    extra=("qk_norm",),
)
QWEN3_30B = Model(
    f"{HUB}/Qwen/Qwen3-30B-A3B/blob/main/config.json",
    "qwen3moe",
    "30B-A3B",
    ("Q4_K_M", "Q6_K", "Q8_0"),
    151936,
    _values(48, 2048, 6144, 32, 4, 40960, 128, **_moe(128, 8, 768)),
    sparse,
    extra=("qk_norm",),
)
GEMMA3_12B = Model(
    f"{HUB}/google/gemma-3-12b-it/blob/main/config.json",
    "gemma3",
    "12B",
    ("Q4_K_M", "Q4_0", "Q8_0"),
    262208,
    _values(48, 3840, 15360, 16, 8, 131072, 256, attention__sliding_window=1024),
    dense,
    tied=True,
    extra=("qk_norm", "post_norms"),
)
GPT_OSS_20B = Model(
    f"{HUB}/openai/gpt-oss-20b/blob/main/config.json",
    "gpt-oss",
    "20B",
    ("MXFP4",),
    201088,
    _values(
        24, 2880, 2880, 64, 8, 131072, 64, **_moe(32, 4, 2880), attention__sliding_window=128, rope__freq_base=1.5e5
    ),
    gpt_oss,
    extra=("bias",),
)

MODELS: dict[str, Model] = {
    "llama-3.2-1b": replace(
        LLAMA_8B,
        source=f"{HUB}/meta-llama/Llama-3.2-1B-Instruct/blob/main/config.json",
        label="1B",
        values=_values(16, 2048, 8192, 32, 8, 131072, 64, rope__freq_base=5e5),
        tied=True,
    ),
    "llama-3.1-8b": LLAMA_8B,
    "llama-3.3-70b": replace(
        LLAMA_8B,
        source=f"{HUB}/meta-llama/Llama-3.3-70B-Instruct/blob/main/config.json",
        label="70B",
        quants=("Q4_K_M", "IQ3_M"),
        values=_values(80, 8192, 28672, 64, 8, 131072, rope__freq_base=5e5),
    ),
    "deepseek-r1-distill-llama-8b": replace(
        LLAMA_8B, source=f"{HUB}/deepseek-ai/DeepSeek-R1-Distill-Llama-8B/blob/main/config.json", quants=("Q4_K_M",)
    ),
    "mistral-small-24b": Model(
        f"{HUB}/mistralai/Mistral-Small-3.2-24B-Instruct-2506/blob/main/params.json",
        "llama",
        "24B",
        ("Q4_K_M", "Q8_0"),
        131072,
        _values(40, 5120, 32768, 32, 8, 131072, 128, rope__freq_base=1e9),
        dense,
    ),
    "qwen2.5-coder-1.5b": replace(
        QWEN2_7B,
        source=f"{HUB}/Qwen/Qwen2.5-Coder-1.5B-Instruct/blob/main/config.json",
        label="1.5B",
        quants=("Q4_K_M",),
        vocabulary=151936,
        values=_values(28, 1536, 8960, 12, 2, 32768),
        tied=True,
    ),
    "qwen2.5-7b": QWEN2_7B,
    "qwen2.5-coder-7b": replace(
        QWEN2_7B, source=f"{HUB}/Qwen/Qwen2.5-Coder-7B-Instruct/blob/main/config.json", quants=("Q4_K_M",)
    ),
    "qwen2.5-14b": replace(
        QWEN2_7B,
        source=f"{HUB}/Qwen/Qwen2.5-14B-Instruct/blob/main/config.json",
        label="14B",
        quants=("Q4_K_M",),
        values=_values(48, 5120, 13824, 40, 8, 32768),
    ),
    "qwen2.5-32b": replace(
        QWEN2_7B,
        source=f"{HUB}/Qwen/Qwen2.5-32B-Instruct/blob/main/config.json",
        label="32B",
        quants=("Q4_K_M", "IQ3_M"),
        values=_values(64, 5120, 27648, 40, 8, 32768),
    ),
    "qwen2.5-vl-7b": replace(
        QWEN2_7B,
        source=f"{HUB}/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/config.json",
        architecture="qwen2vl",
        quants=("Q4_K_M",),
        values=_values(28, 3584, 18944, 28, 4, 128000, rope__dimension_sections=[16, 24, 24, 0]),
    ),
    "qwen3-1.7b": replace(
        QWEN3_8B,
        source=f"{HUB}/Qwen/Qwen3-1.7B/blob/main/config.json",
        label="1.7B",
        quants=("Q4_K_M",),
        values=_values(28, 2048, 6144, 16, 8, 40960, 128),
        tied=True,
    ),
    "qwen3-8b": QWEN3_8B,
    "qwen3-embedding-8b": replace(
        QWEN3_8B,
        source=f"{HUB}/Qwen/Qwen3-Embedding-8B/blob/main/config.json",
        quants=("Q8_0", "F16"),
        vocabulary=151665,
        values=QWEN3_8B.values | {"pooling_type": 3},
        tied=True,
    ),
    "qwen3-30b-a3b": QWEN3_30B,
    "qwen3-coder-30b-a3b": replace(
        QWEN3_30B,
        source=f"{HUB}/Qwen/Qwen3-Coder-30B-A3B-Instruct/blob/main/config.json",
        quants=("Q8_0", "Q6_K", "Q4_K_M"),
        values=_values(48, 2048, 5472, 32, 4, 262144, 128, **_moe(128, 8, 768), rope__freq_base=1e7),
    ),
    "qwen3-next-80b-a3b": Model(
        f"{HUB}/Qwen/Qwen3-Next-80B-A3B-Instruct/blob/main/config.json",
        "qwen3next",
        "80B-A3B",
        ("Q4_K_M", "Q8_0"),
        151936,
        _values(
            48,
            2048,
            5120,
            16,
            2,
            262144,
            256,
            **_moe(512, 10, 512, expert_shared_feed_forward_length=512),
            full_attention_interval=4,
            ssm__conv_kernel=4,
            ssm__state_size=128,
            ssm__group_count=16,
            ssm__time_step_rank=32,
            ssm__inner_size=4096,
            rope__dimension_count=64,
            rope__freq_base=1e7,
        ),
        hybrid,
        extra=("qk_norm",),
    ),
    "qwen3.5-122b-a10b": Model(
        f"{HUB}/Qwen/Qwen3.5-122B-A10B/blob/main/config.json",
        "qwen35moe",
        "122B-A10B",
        ("Q4_K_M", "Q5_K_S"),
        248320,
        _values(
            48,
            3072,
            0,
            32,
            2,
            262144,
            256,
            **_moe(256, 8, 1024, expert_shared_feed_forward_length=1024),
            full_attention_interval=4,
            ssm__conv_kernel=4,
            ssm__state_size=128,
            ssm__group_count=16,
            ssm__time_step_rank=64,
            ssm__inner_size=8192,
            rope__dimension_count=64,
            rope__dimension_sections=[11, 11, 10, 0],
            rope__freq_base=1e7,
        ),
        hybrid,
        extra=("qk_norm",),
    ),
    "gemma-3-12b": GEMMA3_12B,
    "gemma-3-27b": replace(
        GEMMA3_12B,
        source=f"{HUB}/google/gemma-3-27b-it/blob/main/config.json",
        label="27B",
        quants=("Q4_K_M", "Q4_0"),
        values=_values(62, 5376, 21504, 32, 16, 131072, 128, attention__sliding_window=1024),
    ),
    "gemma-4-26b-a4b": Model(
        f"{HUB}/google/gemma-4-26B-A4B-it/blob/main/config.json",
        "gemma4",
        "26B-A4B",
        ("Q4_0", "Q5_K_M", "Q8_0"),
        262144,
        _values(
            30,
            2816,
            2112,
            16,
            [8, 8, 8, 8, 8, 2] * 5,
            262144,
            512,
            **_moe(128, 8, 704),
            attention__key_length_swa=256,
            attention__value_length_swa=256,
            attention__sliding_window=1024,
            attention__sliding_window_pattern=([True] * 5 + [False]) * 5,
            attention__shared_kv_layers=0,
            embedding_length_per_layer_input=0,
            final_logit_softcapping=30.0,
            rope__dimension_count=512,
            rope__dimension_count_swa=256,
            rope__freq_base_swa=1e4,
        ),
        gemma4,
        tied=True,
    ),
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-120b": replace(
        GPT_OSS_20B,
        source=f"{HUB}/openai/gpt-oss-120b/blob/main/config.json",
        label="120B",
        values=GPT_OSS_20B.values | {"block_count": 36, "expert_count": 128},
    ),
    "deepseek-v3": Model(
        f"{HUB}/deepseek-ai/DeepSeek-V3-0324/blob/main/config.json",
        "deepseek2",
        "671B",
        ("Q4_K_M", "Q2_K"),
        129280,
        _values(
            61,
            7168,
            18432,
            128,
            1,
            163840,
            576,
            **_moe(
                256,
                8,
                2048,
                expert_shared_count=1,
                expert_weights_scale=2.5,
                expert_weights_norm=True,
                expert_gating_func=2,
            ),
            leading_dense_block_count=3,
            attention__value_length=512,
            attention__q_lora_rank=1536,
            attention__kv_lora_rank=512,
            attention__key_length_mla=192,
            attention__value_length_mla=128,
            rope__dimension_count=64,
            rope__freq_base=1e4,
        ),
        deepseek,
    ),
    "glm-4.5-air": Model(
        f"{HUB}/zai-org/GLM-4.5-Air/blob/main/config.json",
        "glm4moe",
        "106B-A12B",
        ("Q4_K_M", "Q6_K"),
        151552,
        _values(
            47,
            4096,
            10944,
            96,
            8,
            131072,
            128,
            **_moe(
                128,
                8,
                1408,
                expert_shared_count=1,
                expert_weights_scale=1.0,
                expert_weights_norm=True,
                expert_gating_func=2,
            ),
            leading_dense_block_count=1,
            nextn_predict_layers=1,
            rope__dimension_count=64,
        ),
        glm,
        extra=("bias",),
    ),
    "phi-4": Model(
        f"{HUB}/microsoft/phi-4/blob/main/config.json",
        "phi3",
        "14B",
        ("Q4_K_M", "Q8_0"),
        100352,
        _values(40, 5120, 17920, 40, 10, 16384, rope__freq_base=2.5e5, attention__sliding_window=0),
        phi,
    ),
    "nomic-embed-text-v1.5": Model(
        f"{HUB}/nomic-ai/nomic-embed-text-v1.5/blob/main/config.json",
        "nomic-bert",
        "137M",
        ("F16", "Q8_0"),
        30522,
        {
            "context_length": 2048,
            "block_count": 12,
            "embedding_length": 768,
            "feed_forward_length": 3072,
            "attention.head_count": 12,
            "attention.layer_norm_epsilon": 1e-12,
            "attention.causal": False,
            "pooling_type": 1,
            "rope.freq_base": 1000.0,
        },
        nomic_bert,
        tokenizer="bert",
    ),
}

# Projectors; they go beside a model and are none.
PROJECTORS: dict[str, Model] = {
    "mmproj-qwen2.5-vl-7b": Model(
        f"{HUB}/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/config.json",
        "clip",
        "7B",
        ("F16", "Q8_0"),
        0,
        {
            "projector_type": "qwen2.5vl_merger",
            "has_vision_encoder": True,
            "use_silu": True,
            "vision.image_size": 560,
            "vision.patch_size": 14,
            "vision.embedding_length": 1280,
            "vision.feed_forward_length": 3420,
            "vision.block_count": 32,
            "vision.attention.head_count": 16,
            "vision.attention.layer_norm_epsilon": 1e-6,
            "vision.projection_dim": 3584,
            "vision.n_wa_pattern": 8,
            "vision.spatial_merge_size": 2,
            "vision.image_mean": [0.48145466, 0.4578275, 0.40821073],
            "vision.image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        vision,
        extra=("gated",),
    ),
    "mmproj-gemma-3-12b": Model(
        f"{HUB}/google/gemma-3-12b-it/blob/main/config.json",
        "clip",
        "12B",
        ("F16", "Q8_0"),
        0,
        {
            "projector_type": "gemma3",
            "has_vision_encoder": True,
            "use_gelu": True,
            "vision.image_size": 896,
            "vision.patch_size": 14,
            "vision.embedding_length": 1152,
            "vision.feed_forward_length": 4304,
            "vision.block_count": 27,
            "vision.attention.head_count": 16,
            "vision.attention.layer_norm_epsilon": 1e-6,
            "vision.projection_dim": 3840,
            "vision.image_mean": [0.5, 0.5, 0.5],
            "vision.image_std": [0.5, 0.5, 0.5],
        },
        vision,
    ),
}
PROJECTORS["mmproj-gemma-3-27b"] = replace(
    PROJECTORS["mmproj-gemma-3-12b"],
    source=f"{HUB}/google/gemma-3-27b-it/blob/main/config.json",
    label="27B",
    values=PROJECTORS["mmproj-gemma-3-12b"].values | {"vision.projection_dim": 5376},
)


class Quantiser:
    """Gives each tensor its type by the rules of llama-quantize; those for 8 experts and for Falcon are left out."""

    def __init__(self, model: Model, quant: str, names: list[str]) -> None:
        self.model, self.quant, self.base = model, quant, QUANTS[quant][1]
        self.tied = "output.weight" not in names
        self.values = sum(self._is_value(name) for name in names)
        self.value = 0  # the next tensor of values
        self.down = 0  # the next dense ffn_down

    @staticmethod
    def _is_value(name: str) -> bool:
        return "attn_v.weight" in name or "attn_qkv.weight" in name

    def type(self, name: str, shape: tuple[int, ...]) -> T:
        """The type of a tensor; to be asked in the order of the file."""
        kept = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "token_types", "position_embd", "patch_embd")
        if len(shape) < 2 or not name.endswith("weight") or any(part in name for part in kept):
            return T.F32
        if self.base in (T.F16, T.BF16):
            return self.base
        wanted = self._wanted(name, shape)
        if shape[0] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = FALLBACK.get(wanted, wanted)
            if shape[0] % gguf.GGML_QUANT_SIZES[wanted][0]:
                return T.F16
        return wanted

    def _wanted(self, name: str, shape: tuple[int, ...]) -> T:
        quant, base = self.quant, self.base
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            if quant == "MXFP4" or base is T.Q8_0 or shape[0] % gguf.GGML_QUANT_SIZES[base][0]:
                return T.Q8_0
            return T.Q6_K
        if quant == "MXFP4":
            return T.MXFP4 if len(shape) == 3 else T.Q8_0
        if self._is_value(name):
            return self._of_values(name)
        if "ffn_down" in name:
            return self._of_down(name)
        if "attn_output.weight" in name:
            return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "IQ3_M": T.Q4_K}.get(quant, base)
        return base

    @staticmethod
    def _more_bits(number: int, count: int) -> bool:
        return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2

    def _of_values(self, name: str) -> T:
        number, model, kind = self.value, self.model, self.base
        self.value += 1
        grouped = not isinstance(model.values.get("attention.head_count_kv", []), list) and (
            model.heads // model.kv_heads >= 4
        )
        if self.quant in ("Q4_K_M", "Q5_K_M") and self._more_bits(number, self.values):
            kind = T.Q6_K
        elif self.quant == "Q4_K_S" and number < 4:
            kind = T.Q5_K
        elif self.quant == "IQ3_M":
            kind = T.Q4_K
        elif self.quant == "Q3_K_M":
            kind = T.Q5_K if number < 2 else T.Q4_K
        elif self.quant == "Q2_K":
            kind = T.Q4_K if grouped else T.Q3_K
        elif self.quant == "IQ4_XS" and grouped:
            kind = T.Q5_K
        if model.label == "70B" and kind in (T.Q3_K, T.Q4_K):
            kind = T.Q5_K
        return kind

    def _of_down(self, name: str) -> T:
        count = self.model.layers
        number = self.down
        self.down += 1
        if self.model.values.get("expert_count"):
            number = int(name.split(".")[1])
        if self.quant in ("Q4_K_M", "Q5_K_M") and self._more_bits(number, count):
            return T.Q6_K
        if self.quant == "Q4_K_S" and number < count // 8:
            return T.Q5_K
        if self.quant == "Q3_K_M":
            return T.Q5_K if number < count // 16 else T.Q4_K
        if self.quant == "IQ3_M" and number < count // 8:
            return T.Q4_K
        return T.Q3_K if self.quant == "Q2_K" else self.base


class _Writer(gguf.GGUFWriter):
    """PyPI's writer, which would take a second for a vocabulary: long arrays are packed at once here."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if not isinstance(val, list) or len(val) < 1000:
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        kind = gguf.GGUFValueType.get_type(val[0])
        if kind is gguf.GGUFValueType.STRING:
            packed = b"".join([struct.pack("<Q", len(text)) + text for text in val])
        else:
            packed = struct.pack(f"<{len(val)}{'f' if kind is gguf.GGUFValueType.FLOAT32 else 'i'}", *val)
        return struct.pack("<I", vtype) * add_vtype + struct.pack("<IQ", kind, len(val)) + packed


def _writer(name: str, quant: str, vocabulary: bool, split: int = 0) -> gguf.GGUFWriter:
    model = MODELS.get(name) or PROJECTORS[name]
    writer = _Writer(None, model.architecture, split_max_size=split)
    writer.add_type("mmproj" if name in PROJECTORS else "model")
    writer.add_name(f"synthetic {name}")
    writer.add_description("The shape of a published model without its weights, for tests")
    writer.add_size_label(model.label)
    writer.add_file_type(QUANTS[quant][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in model.values.items():
        _add(writer, f"{model.architecture}.{key}", value)
    if model.vocabulary:
        writer.add_vocab_size(model.vocabulary)
        _add_tokens(writer, model, vocabulary)
    tensors = list(model.tensors(model))
    quantiser = Quantiser(model, quant, [tensor for tensor, _shape in tensors])
    for tensor, shape in tensors:
        kind = quantiser.type(tensor, shape)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        elements = 1
        for length in shape:
            elements *= length
        writer.add_tensor_info(
            tensor, shape[::-1], numpy.dtype(numpy.float32), elements // block * size, raw_dtype=kind
        )
    return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokens(writer: gguf.GGUFWriter, model: Model, vocabulary: bool) -> None:
    """The vocabulary; without it the file is of no use to llama.cpp, and says the same of the model's memory."""
    writer.add_tokenizer_model(model.tokenizer)
    if not vocabulary:
        return
    kind = gguf.TokenType
    if model.tokenizer == "bert":
        tokens = [f"[{text}]".encode() for text in ("PAD", "UNK", "CLS", "SEP", "MASK")]
        kinds = [int(kind.CONTROL)] * len(tokens)
        writer.add_token_type_count(2)
        for number, add in enumerate(
            (writer.add_pad_token_id, writer.add_unk_token_id, writer.add_bos_token_id, writer.add_sep_token_id)
        ):
            add(number)
        writer.add_eos_token_id(3)
        writer.add_mask_token_id(4)
    else:
        tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
        kinds = [int(kind.UNKNOWN), int(kind.CONTROL), int(kind.CONTROL), *[int(kind.BYTE)] * 256]
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    rest = model.vocabulary - len(tokens)
    tokens += [b"\xe2\x96\x81synthetic%d" % number for number in range(rest)]
    kinds += [int(kind.NORMAL)] * rest
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(model.vocabulary)])
    writer.add_token_types(kinds)


def _write_headers(writer: gguf.GGUFWriter, path: Path) -> list[tuple[Path, int]]:
    """Write metadata and tensor descriptions; return each file with the size that it has with its weights."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    align = writer.data_alignment
    paths = [Path(file.name) for file in writer.fout]
    writer.close()
    return [
        (
            file,
            writer.ggml_pad(file.stat().st_size, align)
            + sum(writer.ggml_pad(info.nbytes, align) for info in tensors.values()),
        )
        for file, tensors in zip(paths, writer.tensors)
    ]


def model(name: str, quant: str, directory: Path, split: int = 0) -> Path:
    """Write a sparse file of the full size, or several after so many bytes each; return the path of the first."""
    path = directory / f"synthetic_{name}-{quant}.gguf"
    files = _write_headers(_writer(name, quant, vocabulary=True, split=split), path)
    for file, size in files:
        with file.open("r+b") as stream:
            stream.truncate(size)
    return files[0][0]


@functools.cache
def header(name: str, quant: str) -> tuple[bytes, int]:
    """A header without its vocabulary, and the size of the file that it stands for; nothing large is written."""
    with tempfile.TemporaryDirectory() as directory:
        ((path, size),) = _write_headers(_writer(name, quant, vocabulary=False), Path(directory) / "header.gguf")
        return path.read_bytes(), size


def shape(name: str, quant: str) -> dict[str, Any]:
    """What planning knows of such a file: the same as of the file that model() writes."""
    # Only here: the command line needs no Ansible.
    from ansible_collections.homelab.inference.plugins.module_utils import gguf as gguf_reader

    data, size = header(name, quant)
    return gguf_reader.shape([gguf_reader.read_header(io.BytesIO(data), size)])


def main() -> None:
    """Write the named models and projectors, or all, each in the named quantisation or its first one."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for word in sys.argv[2:] or [*MODELS, *PROJECTORS]:
        name, _colon, quant = word.partition(":")
        path = model(name, quant or (MODELS.get(name) or PROJECTORS[name]).quants[0], directory)
        print(
            f"{path}  {path.stat().st_size / 1e9:.2f} GB, {path.stat().st_blocks * 512 >> 20} MiB on disk", flush=True
        )


if __name__ == "__main__":
    main()
