# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GGUF files for tests: real ones by ggml's own writer, and byte by byte what no writer would make."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy

U32, U64, STRING, ARRAY = 4, 10, 8, 9


def write_llama(
    path: Path, layers: int = 2, name: str = "tiny", experts: int = 0, shards: int = 1, tokens: int = 64
) -> Path:
    """A random model of the llama architecture; with shards its tensors are spread over that many files."""
    size = {"split_max_tensors": -(-(2 + layers * 3) // shards), "small_first_shard": False} if shards > 1 else {}
    writer = gguf.GGUFWriter(path, "llama", **size)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label("60K")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(2048)
    writer.add_block_count(layers)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{number}>" for number in range(tokens)])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    random = numpy.random.default_rng(1)

    def tensor(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, numpy.float32)
        if len(shape) > 1:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)

    tensor("token_embd.weight", tokens, 64)
    for layer in range(layers):
        tensor(f"blk.{layer}.attn_norm.weight", 64)
        tensor(f"blk.{layer}.attn_q.weight", 64, 64)
        if experts:
            tensor(f"blk.{layer}.ffn_down_exps.weight", experts, 64, 96)
        else:
            tensor(f"blk.{layer}.ffn_down.weight", 64, 96)
    tensor("output_norm.weight", 64)
    return _finish(writer, path)


def write_projector(path: Path) -> Path:
    """A multimodal projector as far as its header goes."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_uint32("clip.vision.block_count", 2)
    writer.add_tensor("v.patch_embd.weight", numpy.zeros((4, 8), numpy.float16))
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: bytes, length: int | None = None) -> bytes:
    """A string that may claim another length than it has."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    """A metadata pair."""
    return string(key) + struct.pack("<I", kind) + value


def array(key: bytes, kind: int, count: int, items: bytes) -> bytes:
    """A metadata pair with an array."""
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's description."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(pairs: list[bytes], tensors: list[bytes], version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    """A header that may claim other counts (of tensors, of pairs) than it has."""
    claimed = counts or (len(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", version, *claimed) + b"".join(pairs) + b"".join(tensors)
