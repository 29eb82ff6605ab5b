# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes model files that can be run: shapes drawn at random, random weights of a size at which sums stay numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy
from ansible_collections.homelab.inference.plugins.module_utils import gguf as gguf_reader

from tests.models import synthetic

MIB = 1 << 20
# One of each kind in turn.
KINDS = ("llama", "qwen3moe", "gemma3", "qwen2", "qwen3next", "qwen3", "qwen3moe", "llama-tied", "qwen3moe")
QUANTS = {"F16": 16.0, "Q8_0": 8.5, "Q4_K_M": 4.9, "Q4_0": 4.6}  # bits of a weight
LEAST_MIB, MOST_MIB = 120, 600
LEAST_CONTEXT, MOST_CONTEXT = 1024, 8192
# How large weights are about. What a token says of itself outweighs what layers add: else all tokens look alike after
# the first layer, and routers send them all to the same few experts.
SPREAD, TOKEN_SPREAD = 0.02, 1.0
T = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class File:
    """One file of the pool."""

    name: str
    quant: str
    path: Path
    shape: dict[str, Any]
    parameters: int  # that a token goes through, token table and output left out

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def work(self, context: int, slots: int) -> float:
        """Operations that full contexts take."""
        rows = int(self.shape["head_count"]) * int(self.shape["key_length"]) * int(self.shape["block_count"])
        return 2.0 * slots * context * (self.parameters + context * rows)


def pool(random: Random, directory: Path, count: int, work: float) -> Iterator[File]:
    """Write that many models, some of them in two quantisations, and yield each file when it is there.

    :param work: operations that the shortest context of a model may take.
    """
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        quant = list(QUANTS)[(number + number // len(QUANTS)) % len(QUANTS)]
        name = f"{kind}-{number}"
        model = synthetic.MODELS[name] = _drawn(random, kind, quant, work / 2 / LEAST_CONTEXT)
        for one in [quant, "Q4_0"] if number % 4 == 1 and quant != "Q4_0" else [quant]:
            path = synthetic.model(name, one, directory)
            _fill(path, random.getrandbits(32))
            shape = gguf_reader.shape([gguf_reader.read_file(path)])
            yield File(name, one, path, shape, round(_passed(model)))


def _drawn(random: Random, kind: str, quant: str, most: float) -> synthetic.Model:
    """A model of a size drawn at random; its layers follow from it and from how many weights a token may go through."""
    width = random.choice((512, 768, 1024))
    head = random.choice((64, 128))
    kv_heads = random.choice((1, 2))
    heads = kv_heads * random.choice([number for number in (1, 2, 4) if kv_heads * number * head <= width])
    forward = 256 * random.randint(width // 128, width // 64)
    base, tied = synthetic.LLAMA_8B, kind in ("llama-tied", "gemma3")
    further: dict[str, Any] = {}
    step = 1
    if kind == "qwen3moe":
        base = synthetic.QWEN3_30B
        size = (32, 256) if quant == "F16" else (random.choice((32, 64)), 256 * random.randint(1, 2))
        further = synthetic._moe(size[0], 2, size[1])
    elif kind == "qwen3next":
        base, step, head, kv_heads, heads = synthetic.MODELS["qwen3-next-80b-a3b"], 4, 64, 2, 8
        further = synthetic._moe(16, 2, 512, expert_shared_feed_forward_length=512) | {
            "full_attention_interval": 4,
            "ssm__conv_kernel": 4,
            "ssm__state_size": 128,
            "ssm__group_count": 4,
            "ssm__time_step_rank": 8,
            "ssm__inner_size": 1024,
        }
    elif kind == "gemma3":
        base, further = synthetic.GEMMA3_12B, {"attention__sliding_window": random.choice((512, 1024))}
    elif kind == "qwen2":
        # Its heads are together as wide as the model.
        base, heads = synthetic.QWEN2_7B, width // head
    elif kind == "qwen3":
        base = synthetic.QWEN3_8B
    values = synthetic._values(step, width, forward, heads, kv_heads, MOST_CONTEXT, head, **further)
    model = replace(base, label="", vocabulary=1024 * random.randint(4, 24), values=values, tied=tied)
    table = model.vocabulary * width * (1 if tied else 2)
    one = (sum(math.prod(shape) for _name, shape in model.tensors(model)) - table) / step
    through = _passed(model) / step + 2 * LEAST_CONTEXT * heads * head
    wanted = random.uniform(LEAST_MIB, MOST_MIB) * MIB * 8 / QUANTS[quant]
    layers = min((wanted - table) / one, most / through)
    layers = max(step, round(layers / step) * step, 3)
    # What is small for want of layers gets more words.
    lacking = LEAST_MIB * MIB * 8 / QUANTS[quant] - layers * one - table
    more = 1024 * max(0, math.ceil(lacking / 1024 / (table / model.vocabulary)))
    return replace(model, values={**values, "block_count": layers}, vocabulary=model.vocabulary + more)


def _passed(model: synthetic.Model) -> float:
    """Weights that a token goes through: of the experts those that are picked."""
    found = 0.0
    for name, shape in model.tensors(model):
        if name.startswith("blk.") and len(shape) > 1:
            found += math.prod(shape) * (model["expert_used_count"] / model["expert_count"] if len(shape) == 3 else 1)
    return found


def _fill(path: Path, seed: int) -> None:
    """Put weights where synthetic.model left a hole."""
    random = numpy.random.default_rng(seed)
    with path.open("r+b") as stream:
        for tensor in gguf.GGUFReader(path).tensors:
            stream.seek(int(tensor.data_offset))
            stream.write(_data(random, tensor).tobytes())
        os.fsync(stream.fileno())


def _data(random: numpy.random.Generator, tensor: Any) -> numpy.ndarray:
    count = int(tensor.n_elements)
    kind = tensor.tensor_type
    spread = TOKEN_SPREAD if tensor.name == "token_embd.weight" else SPREAD
    if kind is T.F32:
        return _numbers(random, tensor.name, count)
    if kind is T.F16:
        return (random.standard_normal(count, dtype=numpy.float32) * numpy.float32(spread)).astype(numpy.float16)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (count // elements, size), dtype=numpy.uint8)
    # Where a block keeps its scales, as half floats; all else in it may be anything.
    for offset, value in {
        T.Q8_0: ((0, spread / 73),),
        T.Q4_0: ((0, spread / 4.6),),
        T.Q5_0: ((0, spread / 9.2),),
        T.Q4_K: ((0, spread / 240), (2, spread / 32)),
        T.Q6_K: ((208, spread / 1300),),
    }[kind]:
        blocks[:, offset : offset + 2] = numpy.frombuffer(numpy.float16(value).tobytes(), numpy.uint8)
    return blocks


def _numbers(random: numpy.random.Generator, name: str, count: int) -> numpy.ndarray:
    if name.endswith("norm.weight"):
        return numpy.ones(count, numpy.float32)
    if name.endswith("ssm_a"):
        return -random.uniform(0.5, 2.0, count).astype(numpy.float32)
    return (random.standard_normal(count) * SPREAD).astype(numpy.float32)
