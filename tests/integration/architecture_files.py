# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Scales up the tiny models of all architectures that llama.cpp's test-llama-archs writes.

More layers in the same pattern, wider feed-forward parts, a longer vocabulary, a wider window: until the weights are of
a size at which an error shows. Tensor data is a hole. The engine refuses a file in which anything does not go together.
"""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy

ROOT = Path(__file__).parents[2]
IMAGE = "homelab-inference/llama.cpp-tests:dev"
MOST_LAYERS = 200
TOKENS = 4096
WINDOW = 23  # times the file's own
BLOCK = re.compile(r"^blk\.(\d+)\.(.*)$")
# Tensors of the feed-forward part: their outputs or their inputs are as wide as it.
OUTWARDS = re.compile(r"^(?:ffn|vis)_(?:up|gate|gate_up)(_exps|_shexp)?\.(?:weight|bias)$")
INWARDS = re.compile(r"^(?:(?:ffn|vis)_down(_exps|_shexp)?\.weight|ffn\.act\.scales)$")
WIDTHS = {None: "feed_forward_length", "_exps": "expert_feed_forward_length"}
SHARED = "expert_shared_feed_forward_length"
BY_TOKEN = re.compile(r"^(?:token_embd|output)\.(?:weight|bias)$|^per_layer_token_embd\.weight$")

Tensors = list[tuple[str, list[int]]]


def write_all(folder: Path) -> list[Path]:
    """Let the engine's own test write its models."""
    subprocess.run([ROOT / "tests/images/llama.cpp-tests/build", IMAGE], check=True, capture_output=True)
    command = ["docker", "run", "--rm", "--network", "none", "--volume", f"{folder}:/out", IMAGE, "-o", "/out"]
    subprocess.run(command, check=True, capture_output=True)
    return sorted(folder.glob("*.gguf"))


class Scaled:
    """One model, and how it grows."""

    def __init__(self, source: Path, wider: int, weights: int) -> None:
        reader = gguf.GGUFReader(source)
        self._values = {
            name: (field.types, field.contents())
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        self._tensors = [(tensor.name, [int(size) for size in tensor.shape]) for tensor in reader.tensors]
        self._architecture = self._values["general.architecture"][1]
        self._wider = wider
        self._own = int(self._get("block_count"))
        # The first layers may be made otherwise than all others.
        self._again = min(
            self._own - 1, max(self._get("leading_dense_block_count"), 1 if self._get("ple.layers") else 0)
        )
        self._tokens = TOKENS if self._get("vocab_size") == 128 else 128
        if self._get("hrm.layers_per_stack"):
            # Its layers are gone through several times, in an order that only its own number fits.
            self._layers = self._own
            self._wider = wider * 32
        else:
            self._layers = self._enough(weights)

    def _get(self, key: str) -> Any:
        return self._values.get(f"{self._architecture}.{key}", (None, 0))[1]

    def write(self, target: Path) -> None:
        """Header, and a hole as long as its tensors."""
        writer = gguf.GGUFWriter(target, self._architecture)
        for name, (types, value) in self._values.items():
            value = self._value(name, value)
            if name == "general.architecture" or value == []:
                continue
            if isinstance(value, list):
                writer.add_key_value(name, value, types[0], sub_type=types[-1])
            else:
                writer.add_key_value(name, value, types[0])
        end = 0
        for name, shape in self._grown(self._layers):
            size = 4 * math.prod(shape)
            writer.add_tensor_info(name, shape[::-1], numpy.dtype(numpy.float32), size)
            end += -(-size // 32) * 32
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with target.open("r+b") as stream:
            stream.truncate(-(-target.stat().st_size // 32) * 32 + end)

    def _pattern(self, index: int) -> int:
        """The layer of the tiny model that a layer is made after."""
        return index if index < self._own else self._again + (index - self._again) % (self._own - self._again)

    def _enough(self, weights: int) -> int:
        """Layers until the weights are large enough, and one more: no multiple of the pattern."""
        layers = self._own
        while layers < MOST_LAYERS:
            size = 4 * sum(math.prod(shape) for _name, shape in self._grown(layers))
            if size >= weights:
                break
            layers += max(1, (weights - size) * layers // (2 * size))
        return min(layers, MOST_LAYERS) + 1

    def _grown(self, layers: int) -> Tensors:
        result: Tensors = []
        blocks: dict[int, Tensors] = {}
        for name, shape in self._tensors:
            match = BLOCK.match(name)
            if match:
                index = int(match[1])
                blocks.setdefault(index, []).append((match[2], self._wide(match[2], shape, index)))
            elif BY_TOKEN.match(name):
                result.append((name, [*shape[:-1], shape[-1] // 128 * self._tokens]))
            else:
                result.append((name, shape))
        for index in range(layers):
            result += [(f"blk.{index}.{name}", shape) for name, shape in blocks.get(self._pattern(index), [])]
        return result

    def _wide(self, name: str, shape: list[int], index: int) -> list[int]:
        match = OUTWARDS.match(name)
        axis = 1 if match and name.endswith("weight") else 0
        match = match or INWARDS.match(name)
        if not match:
            return shape
        width = self._get(WIDTHS.get(match[1], SHARED)) or self._get("feed_forward_length")
        if isinstance(width, list):
            width = width[index]
        # A fused gate is twice as wide, qwen's half as wide. What has another width hangs on something else.
        if match[1] != "_shexp" and shape[axis] not in (width, 2 * width, width // 2):
            return shape
        return [size * self._wider if at == axis else size for at, size in enumerate(shape)]

    def _value(self, name: str, value: Any) -> Any:
        key = name[len(self._architecture) + 1 :] if name.startswith(f"{self._architecture}.") else ""
        times = self._tokens // 128
        if key == "block_count":
            return self._layers
        if key == "attention.sliding_window":
            return value * WINDOW
        if key == "vocab_size":
            return value * times
        if name == "tokenizer.ggml.tokens":
            return [f"tok_{number}" for number in range(len(value) * times)]
        if name.startswith("tokenizer.ggml.") and isinstance(value, list):
            return value[:1] * (len(value) * times)
        if key.startswith("ple.head_"):
            return [
                number * self._tokens if key == "ple.head_offsets" else self._tokens for number in range(len(value))
            ]
        if key in (*WIDTHS.values(), SHARED):
            value = [one * self._wider for one in value] if isinstance(value, list) else value * self._wider
        if isinstance(value, list) and len(value) == self._own and not key.startswith("ple."):
            return [value[self._pattern(index)] for index in range(self._layers)]
        return value
