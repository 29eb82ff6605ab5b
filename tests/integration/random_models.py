# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real GGUF files of some hundred MiB with random weights in them: no hole, so that memory is really taken.

Quantised weights are random bytes with small scales, in the block layouts of ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType
# For each type elements and bytes of a block, and where in it a half-precision scale of which size stands.
BLOCKS = {
    Type.Q4_0: (32, 18, {0: 0.005}),
    Type.Q8_0: (32, 34, {0: 0.0003}),
    Type.IQ4_NL: (32, 18, {0: 0.0005}),
    Type.Q4_K: (256, 144, {0: 0.0002, 2: 0.0002}),
    Type.Q6_K: (256, 210, {208: 0.00001}),
}


@dataclass(frozen=True)
class Model:
    """One model to write."""

    quant: str
    architecture: str = "llama"  # or gemma3, qwen3moe
    width: int = 1024
    layers: int = 12
    heads: int = 16
    heads_kv: int = 16
    forward: int = 3072
    vocabulary: int = 8192
    experts: int = 0
    window: int = 0
    tied: bool = False


def write(path: Path, model: Model) -> None:
    """Write one."""
    random = np.random.default_rng(len(path.name))
    kind = Type[model.quant]
    head, name = model.width // model.heads, model.architecture
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(8192)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.heads_kv)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(model.forward)
    if model.window:
        writer.add_sliding_window(model.window)
    words = model.vocabulary - 259
    writer.add_vocab_size(model.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>"]
        + [b"<0x%02X>" % byte for byte in range(256)]
        + [f"▁w{number}".encode() for number in range(words)]
    )
    writer.add_token_scores([-float(rank) for rank in range(model.vocabulary)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(tensor: str, rows: int, columns: int, stack: int = 0) -> None:
        data = _random(random, kind, rows * (stack or 1), columns)
        writer.add_tensor(f"{tensor}.weight", data.reshape(stack, rows, -1) if stack else data, raw_dtype=kind)

    def ones(tensor: str, length: int = model.width) -> None:
        writer.add_tensor(f"{tensor}.weight", np.ones(length, np.float32))

    matrix("token_embd", model.vocabulary, model.width)
    if not model.tied:
        matrix("output", model.vocabulary, model.width)
    ones("output_norm")
    for layer in range(model.layers):
        block = f"blk.{layer}"
        ones(f"{block}.attn_norm")
        ones(f"{block}.ffn_norm")
        if name != "llama":
            ones(f"{block}.attn_q_norm", head)
            ones(f"{block}.attn_k_norm", head)
        if name == "gemma3":
            ones(f"{block}.post_attention_norm")
            ones(f"{block}.post_ffw_norm")
        matrix(f"{block}.attn_q", model.width, model.width)
        matrix(f"{block}.attn_k", head * model.heads_kv, model.width)
        matrix(f"{block}.attn_v", head * model.heads_kv, model.width)
        matrix(f"{block}.attn_output", model.width, model.width)
        end = "_exps" if model.experts else ""
        if model.experts:
            router = random.standard_normal((model.experts, model.width), dtype=np.float32)
            writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        matrix(f"{block}.ffn_gate{end}", model.forward, model.width, model.experts)
        matrix(f"{block}.ffn_up{end}", model.forward, model.width, model.experts)
        matrix(f"{block}.ffn_down{end}", model.width, model.forward, model.experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random(random: np.random.Generator, kind: Type, rows: int, columns: int) -> np.ndarray:
    if kind == Type.F16:
        return (random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)).astype(np.float16)
    elements, size, scales = BLOCKS[kind]
    blocks = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for at, scale in scales.items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
