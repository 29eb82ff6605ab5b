# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time

import gguf as reference
import numpy
import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files
from hypothesis import given, settings
from hypothesis import strategies as st

# More of them in a longer run: FUZZ_EXAMPLES=100000
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))


def u32s(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def read(data: bytes, size: int | None = None) -> gguf.Header:
    return gguf.read_header(io.BytesIO(data), len(data) if size is None else size)


def read_shape(path):
    return gguf.shape([gguf.read_file(shard) for shard in gguf.shard_paths(path)])


def test_shape_of_a_dense_model(tmp_path):
    shape = read_shape(files.write_llama(tmp_path / "tiny.gguf"))
    matrix, embedding, down, norm = 64 * 64 // 32 * 34, 64 * 64 // 32 * 34, 64 * 96 // 32 * 34, 64 * 4
    assert shape == {
        "architecture": "llama",
        "type": "model",
        "name": "tiny",
        "size_label": "60K",
        "quant": "Q8_0",
        "parameters": 64 * 64 + 2 * (64 + 64 * 64 + 64 * 96) + 64,
        "context_length": 2048,
        "block_count": 2,
        "embedding_length": 64,
        "head_count": 4,
        "head_count_kv": 2,
        "key_length": 16,
        "value_length": 16,
        "expert_count": 0,
        "expert_used_count": 0,
        "pooling": None,
        "tokenizer": "gpt2",
        "vocab_size": 64,
        "tied_output": True,
        "tensor_count": 8,
        "weights_bytes": embedding + 2 * (norm + matrix + down) + norm,
        "input_bytes": embedding,
        "embedding_bytes": embedding,
        "output_bytes": norm,
        "other_bytes": 0,
        "block_bytes": [norm + matrix + down] * 2,
        "expert_bytes": [],
        "ffn_bytes": [down] * 2,
        "repack_bytes": {"Q8_0": {"blocks": [matrix] * 2, "embedding": embedding, "feed_forward": [down] * 2}},
        "hparams": {"feed_forward_length": 96},
    }
    assert json.loads(json.dumps(shape)) == shape


@pytest.mark.parametrize("experts", [0, 4])
def test_sums_are_those_of_the_reference_reader(tmp_path, experts):
    path = files.write_llama(tmp_path / "tiny.gguf", layers=3, experts=experts)
    shape = read_shape(path)
    tensors = reference.GGUFReader(path).tensors
    assert shape["weights_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors)
    assert shape["parameters"] == sum(int(tensor.n_elements) for tensor in tensors)
    assert sum(shape["expert_bytes"]) == sum(int(tensor.n_bytes) for tensor in tensors if "_exps" in tensor.name)
    assert shape["expert_count"] == experts


def test_tables_that_are_looked_up_are_never_reordered():
    names = [b"token_types.weight", b"blk.0.nextn.embed_tokens.weight", b"blk.0.attn_q.weight"]
    raw = files.header([], [files.tensor(name, [256, 8], 12, 1152 * at) for at, name in enumerate(names)])
    header = read(raw.ljust(8192, b"\0"))
    assert gguf.shape([header])["repack_bytes"] == {"Q4_K": {"blocks": [1152]}}


def test_tensor_types_are_those_of_the_reference():
    # The package knows fewer types than ggml 0.27; what it knows has to agree.
    theirs = {kind.value: (kind.name, *reference.GGML_QUANT_SIZES[kind]) for kind in reference.GGMLQuantizationType}
    # It still has the two floats that ggml made halves of; no file holds this type.
    theirs[9] = ("Q8_1", 32, 36)
    assert {kind: gguf.TENSOR_TYPES[kind] for kind in theirs} == theirs


def test_file_types_are_those_of_the_reference():
    theirs = {
        kind.value: kind.name.replace("MOSTLY_", "").replace("ALL_", "")
        for kind in reference.LlamaFileType
        if kind.name != "GUESSED"
    }
    assert {kind: gguf.FILE_TYPES[kind] for kind in theirs} == theirs


def test_layers_that_differ_are_listed_and_those_that_do_not_are_one_number():
    header = read(
        files.header(
            [
                files.pair(b"general.architecture", files.STRING, files.string(b"gemma3")),
                files.pair(b"gemma3.embedding_length", files.U32, u32s(64)),
                files.array(b"gemma3.attention.head_count", files.U32, 3, u32s(4, 4, 4)),
                files.array(b"gemma3.attention.head_count_kv", files.U32, 3, u32s(4, 0, 2)),
                files.pair(b"gemma3.attention.key_length", files.U32, u32s(24)),
                files.array(b"gemma3.attention.sliding_window_pattern", 7, 3, b"\1\1\0"),
                files.pair(b"gemma3.rope.dimension_count", files.U32, u32s(24)),
                files.pair(b"gemma3.attention.scale", 6, struct.pack("<f", 0.5)),
                files.pair(b"gemma3.pooling_type", files.U32, u32s(3)),
                files.pair(b"general.file_type", files.U32, u32s(1024 + 15)),
            ],
            [],
        )
    )
    shape = gguf.shape([header])
    assert (shape["head_count"], shape["head_count_kv"]) == (4, [4, 0, 2])
    assert (shape["key_length"], shape["value_length"]) == (24, 16)
    assert shape["hparams"] == {"attention.sliding_window_pattern": [True, True, False]}
    assert (shape["pooling"], shape["quant"]) == ("last", "Q4_K_M")


def test_quant_without_a_file_type_is_that_of_most_bytes():
    tensors = [files.tensor(b"a", [64], 0), files.tensor(b"blk.0.b", [256, 64], 12, 256)]
    header = read(files.header([], tensors), 1 << 20)
    assert gguf.shape([header])["quant"] == "Q4_K"


def test_split_set_is_summed(tmp_path):
    whole = read_shape(files.write_llama(tmp_path / "whole.gguf", layers=4))
    files.write_llama(tmp_path / "split.gguf", layers=4, shards=3)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert [part.name for part in parts] == [f"split-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        assert read_shape(part) == whole
    parts[1].unlink()
    with pytest.raises(gguf.GGUFError, match=r"of its 3 shards 1 are missing, first split-00002-of-00003\.gguf\. "):
        gguf.shard_paths(parts[0])


def test_shard_under_another_name_is_refused(tmp_path):
    files.write_llama(tmp_path / "split.gguf", layers=4, shards=3)
    part = (tmp_path / "split-00001-of-00003.gguf").rename(tmp_path / "model.gguf")
    with pytest.raises(gguf.GGUFError, match=r"one of 3 shards, and 1 were found\. "):
        read_shape(part)


def test_impossible_shard_number_is_refused():
    with pytest.raises(gguf.GGUFError, match="shard 00004 of 00003"):
        gguf.shard_names("x-00004-of-00003.gguf")


def test_projector_is_recognised(tmp_path):
    path = files.write_projector(tmp_path / "vision.gguf")
    assert gguf.is_projector(path.name, read_shape(path))
    model = read_shape(files.write_llama(tmp_path / "tiny.gguf"))
    assert not gguf.is_projector("tiny.gguf", model)
    assert gguf.is_projector("mmproj-tiny.gguf", model)


def test_half_a_file_is_refused(tmp_path):
    path = files.write_llama(tmp_path / "tiny.gguf")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(gguf.GGUFError, match=rf"has {size - 1} bytes of the {size} that its header promises\. Fetch"):
        gguf.read_file(path)


def test_big_endian_is_refused(tmp_path):
    writer = reference.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=reference.GGUFEndian.BIG)
    writer.add_tensor("x", numpy.zeros(4, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(gguf.GGUFError, match=r"big-endian\. "):
        gguf.read_file(tmp_path / "big.gguf")


HUGE = 1 << 60
HOSTILE = {
    "empty": (b"", "ends after 0 bytes"),
    "wrong magic": (b"GGML" + b"\0" * 60, "not a GGUF file, it begins with b'GGML'"),
    "version 1": (files.header([], [], version=1), "version 1, too old"),
    "version 4": (files.header([], [], version=4), "version 4, newer"),
    "2^60 tensors": (files.header([], [], counts=(HUGE, 0)), f"claims 0 values and {HUGE} tensors"),
    "2^60 values": (files.header([], [], counts=(0, HUGE)), f"claims {HUGE} values"),
    "values that are not there": (files.header([], [], counts=(0, 4000)), "in the middle"),
    "tensors that are not there": (files.header([], [], counts=(60000, 0)), "in the middle"),
    "key of 4 GiB": (files.header([files.string(b"a", 4 << 30)], []), "a key in its header claims 4294967296 bytes"),
    "string of 4 GiB": (files.header([files.pair(b"a", 8, files.string(b"x", 4 << 30))], []), "in the middle"),
    "string of 2^64": (files.header([files.pair(b"a", 8, files.string(b"x", (1 << 64) - 1))], []), "in the middle"),
    "2^60 numbers": (files.header([files.array(b"a", 10, HUGE, b"")], []), "in the middle"),
    "2^60 strings": (files.header([files.array(b"a", 8, HUGE, b"")], []), f"'a' claims {HUGE} texts"),
    "strings that are not there": (files.header([files.array(b"a", 8, 10**6, b"")], []), "in the middle"),
    "array of arrays": (files.header([files.array(b"a", 9, 1, b"\4" * 64)], []), "'a' is an array of type 9"),
    "unknown type of value": (files.header([files.pair(b"a\n", 77, b"")], []), r"'a\\n' has the unknown type 77"),
    "unknown type of tensor": (files.header([], [files.tensor(b"t", [4], 99)]), "'t' has type 99"),
    "removed type of tensor": (files.header([], [files.tensor(b"t", [4], 4)]), "'t' has type 4"),
    "2^32 dimensions": (files.header([], [files.string(b"t") + b"\xff" * 64]), "4294967295 dimensions"),
    "2^240 weights": (files.header([], [files.tensor(b"t", [HUGE] * 4)]), "impossible shape"),
    "broken block": (files.header([], [files.tensor(b"t", [255], 12)]), r"impossible shape \[255\] for Q4_K"),
    "layer a billion": (files.header([], [files.tensor(b"blk.999999999.x", [1])]), "beyond 4096 layers"),
    "offset of 2^63": (files.header([], [files.tensor(b"t", [1], 0, 1 << 63)]), "that its header promises"),
    "no alignment": (files.header([files.pair(b"general.alignment", 4, b"\0\0\0\0")], []), "alignment is 0"),
    "text for alignment": (
        files.header([files.pair(b"general.alignment", 8, files.string(b"x" * 99))], []),
        "alignment",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_one_sentence(name):
    data, message = HOSTILE[name]
    with pytest.raises(gguf.GGUFError, match=message) as caught:
        read(data)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300 and not text.endswith(".")


def test_header_larger_than_the_limit_is_refused():
    # A sparse file may be as large as it likes; here only its size is.
    data = files.header([files.array(b"a", 0, 1 << 40, b"")], [])
    with pytest.raises(gguf.GGUFError, match="claims more than 64 MiB"):
        read(data, size=1 << 50)


def test_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(gguf.GGUFError, match="not a regular file"):
        gguf.read_file(tmp_path / "model.gguf")


def worst_headers() -> dict[str, bytes]:
    """As much as the limits let through."""
    kept = range(gguf.MAX_PAIRS)
    return {
        "text": files.header([files.pair(b"k%d" % number, 8, files.string(b"\xff" * 4096)) for number in kept], []),
        "arrays": files.header([files.array(b"k%d" % number, 0, 4096, b"\1" * 4096) for number in kept], []),
        "strings": files.header([files.array(b"k", 8, gguf.MAX_STRINGS, bytes(8 * gguf.MAX_STRINGS))], []),
        "long strings": files.header([files.array(b"k", 8, 60, files.string(bytes(1 << 20)) * 60)], []),
        "tensors": files.header([], [files.tensor(b"blk.%d.x" % (number % 4096), [0]) for number in range(65536)])
        + bytes(32),
    }


# Reads each file in a process that may take 100 MiB more than it has when idle.
CHILD = """
import importlib.util, pathlib, resource, sys, time
spec = importlib.util.spec_from_file_location("gguf_under_test", sys.argv[1])
gguf = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gguf
spec.loader.exec_module(gguf)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    started = time.process_time()
    try:
        gguf.shape([gguf.read_file(pathlib.Path(path))])
        outcome = "read"
    except gguf.GGUFError:
        outcome = "refused"
    print(outcome, time.process_time() - started)
"""


def test_worst_headers_take_at_most_a_second_and_100_mib(tmp_path):
    paths = []
    worst = worst_headers()
    for name, data in {**worst, **{name: data for name, (data, _message) in HOSTILE.items()}}.items():
        paths.append(tmp_path / name.replace(" ", "-"))
        paths[-1].write_bytes(data)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, gguf.__file__, *paths], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    outcomes = [line.split() for line in run.stdout.splitlines()]
    # What is not refused has been read to its end: the limits are what is measured here.
    assert [outcome for outcome, _seconds in outcomes] == ["read"] * len(worst) + ["refused"] * len(HOSTILE)
    assert max(float(seconds) for _outcome, seconds in outcomes) < 1


def test_vocabulary_of_128k_tokens_is_passed_over_quickly():
    tokens = b"".join(files.string(b"token%06d" % number) for number in range(131072))
    merges = b"".join(files.string(b"tok en%06d" % number) for number in range(262144))
    data = files.header(
        [
            files.array(b"tokenizer.ggml.tokens", 8, 131072, tokens),
            files.array(b"tokenizer.ggml.scores", 6, 131072, bytes(4 * 131072)),
            files.array(b"tokenizer.ggml.merges", 8, 262144, merges),
        ],
        [files.tensor(b"token_embd.weight", [64, 131072])],
    )
    best = 9.0
    for _run in range(3):
        started = time.process_time()
        header = read(data, size=1 << 30)
        best = min(best, time.process_time() - started)
    assert gguf.shape([header])["vocab_size"] == 131072
    assert best <= 0.3


SEED = files.header(
    [
        files.pair(b"general.architecture", 8, files.string(b"llama")),
        files.pair(b"general.file_type", 4, struct.pack("<I", 15)),
        files.pair(b"llama.embedding_length", 4, struct.pack("<I", 64)),
        files.array(b"llama.attention.head_count", 4, 2, struct.pack("<II", 4, 8)),
        files.array(b"tokenizer.ggml.tokens", 8, 3, files.string(b"a") * 3),
        files.pair(b"llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        files.pair(b"llama.pooling_type", 10, struct.pack("<Q", 1)),
    ],
    [
        files.tensor(b"token_embd.weight", [64, 3], 8),
        files.tensor(b"blk.0.ffn_up_exps.weight", [256, 8, 2], 12, 4096),
        files.tensor(b"output.weight", [64, 3], 0, 8192),
    ],
)
NUMBERS = st.sampled_from([0, 1, 8, 9, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 64) - 1])
CHANGES = st.lists(
    st.tuples(
        st.integers(4, len(SEED) - 8),
        st.one_of(st.binary(min_size=1, max_size=8), NUMBERS.map(lambda number: struct.pack("<Q", number))),
    ),
    max_size=4,
)


def survives(data: bytes, size: int | None) -> None:
    """Either a shape that can be written down, or the one error with one line."""
    started = time.process_time()
    try:
        json.dumps(gguf.shape([gguf.read_header(io.BytesIO(data), size)]), allow_nan=False)
    except gguf.GGUFError as error:
        assert "\n" not in str(error)
    assert time.process_time() - started < 1


@settings(max_examples=EXAMPLES, deadline=None)
@given(CHANGES, st.integers(0, len(SEED)), st.sampled_from([None, 1 << 20, 1 << 62]))
def test_changed_headers_never_break_the_reader(changes, length, size):
    data = bytearray(SEED)
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    survives(bytes(data), size)
    survives(bytes(data[:length]), length)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 8), st.integers(0, 8))
def test_random_headers_never_break_the_reader(data, tensors, pairs):
    survives(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + data, None)
    survives(data, len(data))
