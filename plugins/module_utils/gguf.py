# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a GGUF file says of its model, read from its header alone.

The header may come from anybody, so nothing in it is believed: no count reserves memory before its bytes are there,
and every limit below is far above what real files have. The format is described in docs/gguf.md of ggml.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER = 64 << 20  # bytes; a vocabulary of 262144 tokens with its merges takes 16 MiB at most
MAX_PAIRS = 1 << 12
MAX_TENSORS = 1 << 16
MAX_STRINGS = 2_000_000  # in all string arrays together
MAX_NAME = 1024  # bytes of a key or of a tensor's name
MAX_KEPT = 4096  # bytes; longer values (chat templates, token lists) are counted and passed over
MAX_BLOCKS = 4096
MAX_NUMBER = 1 << 40  # of the architecture's own numbers
COUNTED = ("block_count", "nextn_predict_layers", "expert_count", "expert_used_count")  # at most MAX_BLOCKS each
MAX_SHARDS = 1024
FIRST_CHUNK, LAST_CHUNK = 64 << 10, 4 << 20

# struct code by type of a metadata value
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# ggml type: (name, elements in a block, bytes of a block), as ggml_type_name, ggml_blck_size and ggml_type_size of
# ggml 0.27.0 answer. The missing numbers were removed from the format.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

# general.file_type, as the numbers that llama-quantize of llama.cpp 0.7.0 lists
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
GUESSED = 1024  # set in general.file_type when the writer was not sure

POOLING: dict[int | None, str] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}

SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)$", re.IGNORECASE)
BLOCK = re.compile(r"^(?:enc\.|dec\.)?blk\.(\d{1,9})\.")
# Where llama.cpp puts a tensor hangs on its name (llm_tensor_info in src/llama-arch.cpp, LLM_FFN_*_REGEX in
# common/common.h of 0.5.0).
EXPERT = re.compile(r"\.ffn_(?:up|down|gate|gate_up)_(?:ch)?exps\b")
FEED_FORWARD = re.compile(r"\.ffn_(?:up|down|gate)\.")
INPUT = re.compile(r"^(?:token_embd|position_embd|token_types|per_layer_token_embd|masked_embd_\w+)\.")
SIZES = re.compile(r"^attention\.|^ssm\.|(?:length|count|size|rank|layers)$")  # keys of what cannot be negative
OUTPUT = re.compile(
    r"^(?:(?:enc\.|dec\.)?(?:output|cls)(?:_\w+)?|altup_\w+|dense_[23]|nextn\.post_projection"
    r"|fc|d2t|markov_w[12]|conf_proj|selector_\w+)\."
)
# Types whose matrices the processor may keep in another order (ggml-cpu/repack.cpp): a copy outside the file.
REPACKED = ("Q1_0", "Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4")

# What the shape names itself; every other whole number under the architecture's prefix goes to its hparams.
NAMED = (
    "context_length",
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "pooling_type",
    "vocab_size",
)
# Lists that mean something else than their one value would.
LISTS = ("attention.sliding_window_pattern", "ple.layers")


class GGUFError(Exception):
    """The file cannot be used; the message says why, as what follows "Cannot use FILE: "."""


@dataclass
class Header:
    """One file's header: short metadata values, array lengths, and its tensors summed up by what they are for."""

    version: int
    metadata: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    texts: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # arrays of texts: count, bytes, the next key
    tensor_count: int = 0
    elements: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    other_bytes: int = 0
    block_bytes: dict[int, int] = field(default_factory=dict)
    expert_bytes: dict[int, int] = field(default_factory=dict)
    ffn_bytes: dict[int, int] = field(default_factory=dict)
    repack_bytes: dict[tuple[str, str, int], int] = field(default_factory=dict)  # by type, part and layer
    embedding_bytes: int = 0
    type_bytes: dict[str, int] = field(default_factory=dict)
    has_output: bool = False
    embedded_tokens: int | None = None
    header_bytes: int = 0
    file_bytes: int = 0  # what the file must have at least

    def value(self, key: str) -> Any:
        """A metadata value: scalar, string, or list where a short array of numbers is kept; None when absent."""
        value = self.metadata.get(key)
        if isinstance(value, tuple):
            code, raw = value
            return list(struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw))
        return value

    def whole(self, key: str) -> int | None:
        """A metadata value that is a whole number, else None."""
        value = self.value(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """A metadata value that is text, else None."""
        value = self.value(key)
        return value if isinstance(value, str) else None


class _Cursor:
    """Reads forward through a stream in growing pieces and never beyond the limit."""

    def __init__(self, stream: BinaryIO | io.RawIOBase, size: int | None, limit: int) -> None:
        self._stream, self._size, self._limit = stream, size, limit
        self._buffer, self._at, self._base = b"", 0, 0
        self._chunk = FIRST_CHUNK

    @property
    def position(self) -> int:
        return self._base + self._at

    def _check(self, count: int) -> None:
        if self._size is not None and self.position + count > self._size:
            raise GGUFError(f"its header ends after {self._size} bytes, in the middle. Fetch the file again")
        if self.position + count > self._limit:
            raise GGUFError(
                f"its header claims more than {self._limit >> 20} MiB, which no real model has. Fetch the file again"
            )

    def take(self, count: int) -> bytes:
        if len(self._buffer) - self._at < count:
            self._check(count)
            pieces = [self._buffer[self._at :]]
            have = len(pieces[0])
            while have < count:
                piece = self._stream.read(max(count - have, self._chunk))
                if not piece:
                    raise GGUFError(
                        f"its header ends after {self.position + have} bytes, in the middle. Fetch the file again"
                    )
                pieces.append(piece)
                have += len(piece)
                self._chunk = min(self._chunk * 2, LAST_CHUNK)
            self._base, self._at, self._buffer = self.position, 0, b"".join(pieces)
        self._at += count
        return self._buffer[self._at - count : self._at]

    def skip(self, count: int) -> None:
        available = len(self._buffer) - self._at
        if count <= available:
            self._at += count
            return
        self._check(count)
        beyond = count - available
        self._base, self._at, self._buffer = self.position + count, 0, b""
        self._stream.seek(beyond, os.SEEK_CUR)

    def skip_strings(self, count: int) -> None:
        """Pass over strings; this loop runs once for each token and merge of a vocabulary."""
        length_at = struct.Struct("<Q").unpack_from
        while count:
            buffer, at, end = self._buffer, self._at, len(self._buffer)
            while count and at + 8 <= end:
                after = at + 8 + length_at(buffer, at)[0]
                if after > end:
                    break
                at = after
                count -= 1
            self._at = at
            if count:
                self.skip(self.number("<Q"))
                count -= 1

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self, limit: int, what: str) -> str:
        length = self.number("<Q")
        if length > limit:
            raise GGUFError(f"{what} claims {length} bytes, more than {limit}. Fetch the file again")
        return self.take(length).decode("utf-8", "replace")


def read_header(
    stream: BinaryIO | io.RawIOBase, size: int | None = None, limit: int = MAX_HEADER, like: Header | None = None
) -> Header:
    """Read a header from a seekable stream at its beginning.

    :param size: that of the whole file where it is known.
    :param like: that of the same model in another quantisation. Its vocabulary is then passed over unread; where this
        file has another one after all, that is an error, and the header can be read again without it.
    """
    cursor = _Cursor(stream, size, limit)
    header = Header(_version(cursor))
    tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
    if pairs > MAX_PAIRS or tensors > MAX_TENSORS:
        raise GGUFError(f"its header claims {pairs} values and {tensors} tensors. Fetch the file again")
    strings = MAX_STRINGS
    passed: tuple[str, int, int] | None = None  # the array of texts before: its key, its count, where it began
    expected = None
    for _pair in range(pairs):
        end = cursor.position
        key = cursor.string(MAX_NAME, "a key in its header")
        if expected not in (None, key):
            raise GGUFError(f"its vocabulary ends before {key[:80]!r}, unlike its sibling's. Fetch the file again")
        if passed:
            header.texts[passed[0]] = (passed[1], end - passed[2], key)
        count, start, expected = _read_pair(cursor, header, key, strings, like.texts if like else {})
        passed = (key, count, start) if count else None
        strings -= count
    for _tensor in range(tensors):
        _read_tensor(cursor, header)
    header.header_bytes = cursor.position
    _finish(header, size)
    return header


def _version(cursor: _Cursor) -> int:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise GGUFError(f"it is not a GGUF file, it begins with {magic!r}. Name a file made by llama.cpp's converter")
    version = cursor.number("<I")
    if version & 0xFFFF == 0 and version:
        raise GGUFError("it is big-endian. Take the little-endian file, or convert it with gguf-convert-endian")
    if version not in (2, 3):
        age = "too old" if version < 2 else "newer than what can be read (2 and 3)"
        raise GGUFError(f"it is GGUF version {version}, {age}. Take a file of version 3")
    return version


def _read_pair(
    cursor: _Cursor, header: Header, key: str, strings: int, known: dict[str, tuple[int, int, str]]
) -> tuple[int, int, str | None]:
    """Read a key's value; return of an array of texts its count and beginning, and the key after it if it was known."""
    kind = cursor.number("<I")
    if kind in SCALARS:
        header.metadata[key] = cursor.number("<" + SCALARS[kind])
    elif kind == STRING:
        length = cursor.number("<Q")
        if length <= MAX_KEPT:
            header.metadata[key] = cursor.take(length).decode("utf-8", "replace")
        else:
            cursor.skip(length)
    elif kind == ARRAY:
        kind, count = cursor.number("<I"), cursor.number("<Q")
        header.lengths[key] = count
        if kind == STRING:
            if count > strings:
                raise GGUFError(f"the value {key[:80]!r} claims {count} texts. Fetch the file again")
            start = cursor.position
            known_count, length, after = known.get(key, (0, 0, ""))
            if count and count == known_count:
                cursor.skip(length)
                return count, start, after
            cursor.skip_strings(count)
            return count, start, None
        if kind not in SCALARS:
            raise GGUFError(
                f"the value {key[:80]!r} is an array of type {kind}, which GGUF readers refuse. Convert it again"
            )
        length = count * struct.calcsize(SCALARS[kind])
        if length <= MAX_KEPT:
            # Kept as bytes: a list of numbers would take ten times the room.
            header.metadata[key] = (SCALARS[kind], cursor.take(length))
        else:
            cursor.skip(length)
    else:
        raise GGUFError(f"the value {key[:80]!r} has the unknown type {kind}. Fetch the file again")
    return 0, 0, None


def _read_tensor(cursor: _Cursor, header: Header) -> None:
    name = cursor.string(MAX_NAME, "a tensor's name in its header")
    dimensions = cursor.number("<I")
    if dimensions > 4:
        raise GGUFError(f"the tensor {name[:80]!r} has {dimensions} dimensions, more than 4. Fetch the file again")
    *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", cursor.take(8 * dimensions + 12))
    if kind not in TENSOR_TYPES:
        raise GGUFError(
            f"the tensor {name[:80]!r} has type {kind}, which this version does not know. Take another quant"
        )
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    elements = 1
    for length in shape:
        elements *= length
    if elements >= 1 << 63 or (shape and shape[0] % block):
        raise GGUFError(
            f"the tensor {name[:80]!r} has the impossible shape {shape} for {type_name}. Fetch the file again"
        )
    size = elements // block * block_bytes
    header.tensor_count += 1
    header.elements += elements
    header.type_bytes[type_name] = header.type_bytes.get(type_name, 0) + size
    header.file_bytes = max(header.file_bytes, offset + size)
    match = BLOCK.match(name)
    index = 0
    part = "other"
    if match:
        part, index = "blocks", int(match[1])
        if index >= MAX_BLOCKS:
            raise GGUFError(f"the tensor {name[:80]!r} lies beyond {MAX_BLOCKS} layers. Fetch the file again")
        header.block_bytes[index] = header.block_bytes.get(index, 0) + size
        if EXPERT.search(name):
            part = "experts"
            header.expert_bytes[index] = header.expert_bytes.get(index, 0) + size
        elif FEED_FORWARD.search(name):
            part = "feed_forward"
            header.ffn_bytes[index] = header.ffn_bytes.get(index, 0) + size
    elif INPUT.match(name):
        part = "looked up"
        header.input_bytes += size
        if name == "token_embd.weight" and dimensions > 1:
            part = "embedding"
            header.embedded_tokens, header.embedding_bytes = shape[1], size
    elif OUTPUT.match(name):
        part = "output"
        header.output_bytes += size
        header.has_output = header.has_output or name == "output.weight"
    else:
        header.other_bytes += size
    # Only matrices that are multiplied by, and stacks of them where a router picks one.
    if name.endswith(".nextn.embed_tokens.weight"):
        part = "looked up"
    if (
        type_name in REPACKED
        and part != "looked up"
        and dimensions == (3 if part == "experts" else 2)
        and shape[1] % 8 == 0
    ):
        key = (type_name, part, index)
        header.repack_bytes[key] = header.repack_bytes.get(key, 0) + size


def _finish(header: Header, size: int | None) -> None:
    alignment = header.value("general.alignment")
    if alignment is None:
        alignment = 32
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise GGUFError(f"its alignment is {str(alignment)[:40]}, not a power of two. Fetch the file again")
    if header.tensor_count:
        header.file_bytes += -(-header.header_bytes // alignment) * alignment
    header.file_bytes = max(header.file_bytes, header.header_bytes)
    if size is not None and header.file_bytes > size:
        raise GGUFError(
            f"it has {size} bytes of the {header.file_bytes} that its header promises. Fetch the rest of it"
        )


def read_file(path: Path) -> Header:
    """Read the header of a regular file."""
    try:
        # Looked at before it is opened: opening a FIFO waits for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise GGUFError("it is not a regular file. Name the model file itself")
        with path.open("rb", buffering=0) as stream:
            return read_header(stream, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise GGUFError(f"{error.strerror or error}. Check the path and who may read it") from error


def shard_names(name: str) -> list[str]:
    """The names of all files of the set that this one belongs to, the first one first; itself when it is whole."""
    match = SHARD.match(name)
    if not match:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count or count > MAX_SHARDS:
        raise GGUFError(f"shard {match['number']} of {match['count']} cannot be. Give the file the name that it had")
    return [f"{match['stem']}-{number:05}-of-{count:05}{match['suffix']}" for number in range(1, count + 1)]


def shard_paths(path: Path) -> list[Path]:
    """The files of the set that this one belongs to; all of them are there."""
    paths = [path.with_name(name) for name in shard_names(path.name)]
    missing = [other.name for other in paths if not other.exists()]
    if len(paths) > 1 and missing:
        raise GGUFError(
            f"of its {len(paths)} shards {len(missing)} are missing, first {missing[0]}. Fetch the whole set"
        )
    return paths


def shape(headers: list[Header]) -> dict[str, Any]:
    """What planning needs to know of a model, from its shards in order: plain values, always the same keys.

    Bytes of tensors: C(input_bytes) stay on the processor, of them C(embedding_bytes) in the token table, which a model
    with C(tied_output) has a second time as its output; C(output_bytes) go with the output layer, C(other_bytes) with
    the first; C(block_bytes) are those of each layer, of them C(expert_bytes) in routed experts and C(ffn_bytes) in
    other feed-forward weights; C(repack_bytes) are, by type, those that a processor may keep in another order.
    """
    first = headers[0]
    promised = first.whole("split.count") or 1
    if promised > 1 and promised != len(headers):
        raise GGUFError(
            f"it is one of {promised} shards, and {len(headers)} were found. Keep the names that they came with"
        )
    architecture = first.text("general.architecture")
    prefix = f"{architecture}."
    _check_numbers(first, prefix)
    head_count = _per_layer(first.value(prefix + "attention.head_count"))
    head_count_kv = _per_layer(first.value(prefix + "attention.head_count_kv"))
    embedding_length = first.whole(prefix + "embedding_length")
    widest = max(head_count) if isinstance(head_count, list) else head_count
    head_length = embedding_length // widest if embedding_length and widest and widest > 0 else None
    experts = first.whole(prefix + "expert_count") or 0
    # Some models use more of them in some layers.
    used = _per_layer(first.value(prefix + "expert_used_count")) or 0
    used = max(used) if isinstance(used, list) else used
    if experts and used <= 0:
        raise GGUFError(f"it has {experts} experts and uses none of them. Fetch the file again")
    key_length = first.whole(prefix + "attention.key_length")
    value_length = first.whole(prefix + "attention.value_length")
    vocab_size = first.lengths.get("tokenizer.ggml.tokens") or first.whole(prefix + "vocab_size")
    embedded = next((header.embedded_tokens for header in headers if header.embedded_tokens), None)
    blocks = _by_layer([header.block_bytes for header in headers])
    sums = {
        name: sum(getattr(header, name) for header in headers)
        for name in ("input_bytes", "embedding_bytes", "output_bytes", "other_bytes")
    }
    return {
        "architecture": architecture,
        "type": first.text("general.type"),
        "name": first.text("general.name"),
        "size_label": first.text("general.size_label"),
        "quant": _quant(headers),
        "parameters": sum(header.elements for header in headers),
        "context_length": first.whole(prefix + "context_length"),
        "block_count": first.whole(prefix + "block_count"),
        "embedding_length": embedding_length,
        "head_count": head_count,
        "head_count_kv": head_count if head_count_kv is None else head_count_kv,
        "key_length": head_length if key_length is None else key_length,
        "value_length": head_length if value_length is None else value_length,
        "expert_count": experts,
        "expert_used_count": used,
        "pooling": POOLING.get(first.whole(prefix + "pooling_type")),
        "tokenizer": first.text("tokenizer.ggml.model"),
        "vocab_size": vocab_size or embedded,
        "tied_output": embedded is not None and not any(header.has_output for header in headers),
        "tensor_count": sum(header.tensor_count for header in headers),
        "weights_bytes": sum(blocks) + sum(sums[name] for name in ("input_bytes", "output_bytes", "other_bytes")),
        **sums,
        "block_bytes": blocks,
        "expert_bytes": _by_layer([header.expert_bytes for header in headers]),
        "ffn_bytes": _by_layer([header.ffn_bytes for header in headers]),
        "repack_bytes": _repackable([header.repack_bytes for header in headers]),
        "hparams": _hparams(first, prefix),
    }


def _check_numbers(header: Header, prefix: str) -> None:
    """Planning counts to these numbers, so none may be beyond all models."""
    for key in header.metadata:
        if not key.startswith(prefix):
            continue
        value = header.value(key)
        name = key[len(prefix) :]
        most = MAX_BLOCKS if name in COUNTED else MAX_NUMBER
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int):
                continue
            # Elsewhere -1 stands for "none".
            if not -most <= number <= most or (number < 0 and SIZES.search(name)):
                raise GGUFError(f"its {key[:80]} is {number}, which no real model has. Fetch the file again")


def is_projector(name: str, model: dict[str, Any]) -> bool:
    """Whether a file is a multimodal projector: by what it says of itself, or by the name that llama.cpp looks for."""
    return model["type"] == "mmproj" or model["architecture"] == "clip" or "mmproj" in name.lower()


def _quant(headers: list[Header]) -> str | None:
    number = headers[0].whole("general.file_type")
    if number is not None and number & ~GUESSED in FILE_TYPES:
        return FILE_TYPES[number & ~GUESSED]
    weights: dict[str, int] = {}
    for header in headers:
        for name, size in header.type_bytes.items():
            weights[name] = weights.get(name, 0) + size
    return max(sorted(weights), key=lambda name: weights[name]) if weights else None


def _per_layer(value: Any) -> int | list[int] | None:
    """A number, or one for each layer where they differ."""
    if isinstance(value, list):
        if not value or not all(isinstance(item, int) for item in value):
            return None
        return value[0] if len(set(value)) == 1 else value
    return value if isinstance(value, int) else None


def _by_layer(sizes: list[dict[int, int]]) -> list[int]:
    last = max((index for part in sizes for index in part), default=-1)
    return [sum(part.get(index, 0) for part in sizes) for index in range(last + 1)]


def _repackable(sizes: list[dict[tuple[str, str, int], int]]) -> dict[str, dict[str, Any]]:
    """By type: lists by layer of experts, feed-forward and other weights, sums of the rest; nothing is not named."""
    result: dict[str, dict[str, Any]] = {}
    for name, part in sorted({key[:2] for one in sizes for key in one}):
        by_layer = [{key[2]: size for key, size in one.items() if key[:2] == (name, part)} for one in sizes]
        layers = _by_layer(by_layer)
        result.setdefault(name, {})[part] = layers if part in ("blocks", "experts", "feed_forward") else sum(layers)
    return result


def _hparams(header: Header, prefix: str) -> dict[str, Any]:
    """The other whole numbers and switches of the architecture; memory depends on many of them and on no fraction."""
    result = {}
    for key in sorted(header.metadata):
        name = key[len(prefix) :]
        if key.startswith(prefix) and name not in NAMED and not name.startswith("rope."):
            value = header.value(key)
            if name not in LISTS or not isinstance(value, list):
                value = _per_layer(value)
            if value is not None:
                result[name] = value
    return result
