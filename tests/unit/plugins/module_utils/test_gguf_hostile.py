# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a broken or malicious header does to the reader, and to the planning that goes on with what it said.

Longer: FUZZ_EXAMPLES=100000 pytest tests/unit/plugins/module_utils/test_gguf_hostile.py; guided by coverage:
python tests/fuzz/gguf_header.py.
"""

from __future__ import annotations

import io
import json
import os
import struct
import time

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import predict
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import synthetic

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
GPU = {"id": "gpu0", "vendor": "nvidia", "memory_mib": 8192, "memory_kind": "dedicated"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The header of a file that ggml's own writer wrote."""
    path = files.write_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", tokens=16, experts=2)
    return path.read_bytes()[: gguf.read_file(path).header_bytes]


def outcome(data: bytes, size: int | None) -> str:
    """What comes of it: a shape that can be written down, or one sentence."""
    try:
        json.dumps(gguf.shape([gguf.read_header(io.BytesIO(data), size)]), allow_nan=False)
    except gguf.GGUFError as error:
        text = str(error)
        assert "\n" not in text and ". " in text and len(text) < 400
        return text
    return "read"


def test_a_header_cut_anywhere_is_refused(real: bytes) -> None:
    for length in range(len(real)):
        assert f"ends after {length} bytes" in outcome(real[:length], length)
        # Where nobody knows the size, the end comes as a surprise.
        assert "in the middle" in outcome(real[:length], None)
    assert outcome(real, None) == "read"


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_a_wrong_byte_anywhere_breaks_nothing(real: bytes, byte: int) -> None:
    for at in range(len(real)):
        outcome(real[:at] + bytes([byte]) + real[at + 1 :], None)


@pytest.mark.parametrize("number", [1 << 31, 1 << 60, (1 << 64) - 1])
def test_a_huge_number_anywhere_breaks_nothing(real: bytes, number: int) -> None:
    started = time.process_time()
    for at in range(len(real) - 8):
        outcome(real[:at] + struct.pack("<Q", number) + real[at + 8 :], 1 << 62)
    # Each on its own takes far less than the second that it may.
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 4097),
        ("block_count", 1 << 60),
        ("nextn_predict_layers", 1 << 31),
        ("expert_used_count", 1 << 31),
        ("embedding_length", 1 << 60),
    ],
)
def test_numbers_that_planning_would_count_to_are_refused(key: str, value: int) -> None:
    assert f"its llama.{key} is {value}, which no real model has" in outcome(header("llama", {key: value}), None)


def test_experts_that_nobody_asks_are_refused() -> None:
    assert "it has 8 experts and uses none" in outcome(header("llama", {"expert_count": 8}), None)
    data = header("llama", {"expert_count": 8, "expert_used_count": [2, 4]})
    assert gguf.shape([gguf.read_header(io.BytesIO(data))])["expert_used_count"] == 4


def header(architecture: str, values: dict[str, object]) -> bytes:
    """A small header with these metadata values."""
    prefix = architecture.encode() + b"."
    pairs = [files.pair(b"general.architecture", 8, files.string(architecture.encode()))]
    for key, value in values.items():
        name = prefix + key.encode()
        if isinstance(value, list):
            pairs.append(files.array(name, 11, len(value), struct.pack(f"<{len(value)}q", *map(int, value))))
        elif isinstance(value, float):
            pairs.append(files.pair(name, 6, struct.pack("<f", value)))
        elif isinstance(value, str):
            pairs.append(files.pair(name, 8, files.string(value.encode())))
        else:
            signed = int(value) < 0
            pairs.append(files.pair(name, 11 if signed else 10, struct.pack("<q" if signed else "<Q", int(value))))
    tensors = [
        files.tensor(b"token_embd.weight", [64, 100]),
        files.tensor(b"blk.0.attn_q.weight", [64, 64], 0, 25600),
        files.tensor(b"blk.1.ffn_up_exps.weight", [256, 8, 2], 12, 41984),
    ]
    return files.header(pairs, tensors)


ODD = st.one_of(
    st.sampled_from([-(1 << 31), -1, 0, 1, 2, 3, 255, 4096, 1 << 31, 1 << 40]),
    st.lists(st.sampled_from([-1, 0, 1, 64, 1 << 31]), max_size=6),
    st.floats(width=32),
    st.text(max_size=3),
)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(st.sampled_from(sorted(synthetic.MODELS)), st.data())
def test_planning_with_odd_numbers_ends_in_a_number_or_a_sentence(name: str, data: st.DataObject) -> None:
    model = synthetic.MODELS[name]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(model.values)), ODD, max_size=3))
    started = time.process_time()
    try:
        shape = gguf.shape(
            [gguf.read_header(io.BytesIO(header(model.architecture, {**model.values, **changed})), 1 << 30)]
        )
    except gguf.GGUFError:
        return
    options = {"ctx-size": 8192, "parallel": 2, "n-gpu-layers": "all"}
    for part in predict(shape, options, [GPU], "cuda"):
        assert part["bytes"] >= 0
    assert time.process_time() - started < 1
