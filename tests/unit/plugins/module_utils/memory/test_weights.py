# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import loaded, repacked, weights
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.memory import engine_answers

GPU = [{"id": "gpu0", "vendor": "nvidia", "memory_mib": 8192}]
EMULATED = engine_answers.devices(1)
SHAPE = {
    "architecture": "llama",
    "block_count": 4,
    "tied_output": True,
    "input_bytes": 1000,
    "embedding_bytes": 900,
    "output_bytes": 10,
    "other_bytes": 1,
    "block_bytes": [100, 200, 300, 400],
    "expert_bytes": [0, 20, 30, 40],
    "ffn_bytes": [50, 5, 5, 5],
    "repack_bytes": {
        "Q4_K": {
            "blocks": [57, 57, 57, 57],
            "feed_forward": [3, 3, 3, 3],
            "experts": [0, 7, 8, 9],
            "embedding": 900,
        },
        "Q6_K": {"blocks": [30]},
    },
    "hparams": {},
}


def where(options, devices, shape=None):
    found = weights(shape or SHAPE, {"load-mode": "none", **options}, devices)
    assert {(part["kind"], part["source"]) for part in found} <= {("weights", "computed")}
    return {part["where"]: part["bytes"] for part in found}


@pytest.mark.parametrize(("shape", "answer", "exact"), engine_answers.CASES)
def test_the_engine_says_the_same(shape, answer, exact):
    devices = engine_answers.devices(answer["devices"])
    found = {place: kinds["model"] for place, kinds in answer["found"].items()}
    predicted = {
        part["where"]: part["bytes"] / engine_answers.MIB for part in weights(shape, answer["options"], devices)
    }
    assert engine_answers.agree(predicted, found, exact)
    again = {"host": repacked(shape, answer["options"], devices) / engine_answers.MIB}
    assert engine_answers.agree(again, {"host": answer["found"]["host"].get("repack", 0)}, exact)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # the token table stays on the processor, the tied output is a copy of it
        ({"n-gpu-layers": "all"}, {"host": 1000, "gpu0": 900 + 10 + 1 + 1000}),
        ({"n-gpu-layers": 1}, {"host": 1000 + 1 + 1000, "gpu0": 900 + 10}),
        ({"n-gpu-layers": 3}, {"host": 1000 + 1 + 300, "gpu0": 900 + 10 + 700}),
        ({"n-gpu-layers": 0}, {"host": 1000 + 10 + 1 + 1000}),
        # experts of the first layers, wherever the rest of the layer is
        ({"n-gpu-layers": "all", "n-cpu-moe": 3}, {"host": 1000 + 50, "gpu0": 911 + 950}),
        ({"n-gpu-layers": "all", "cpu-moe": True}, {"host": 1000 + 90, "gpu0": 911 + 910}),
        ({"n-gpu-layers": "all", "n-cpu-ffn": 2}, {"host": 1000 + 55, "gpu0": 911 + 945}),
    ],
)
def test_where_weights_go_beside_a_card(options, expected):
    assert where(options, GPU) == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("exps=CPU", {"host": 1000 + 90, "gpu0": 911 + 910}),
        (r"blk\.(1|2)\.ffn_.*_exps=CPU", {"host": 1000 + 50, "gpu0": 911 + 950}),
        (r"blk\.[01]\.ffn_(up|gate|down)\.=CPU,^output=CPU", {"host": 1000 + 55 + 10, "gpu0": 901 + 945}),
        ([r"blk\.3\.=CPU"], {"host": 1000 + 400, "gpu0": 911 + 600}),
        ("token_embd=CPU", {"host": 1000, "gpu0": 11 + 1000}),
        (r"blk\.3\.=CUDA0", {"host": 1000, "gpu0": 911 + 1000}),
        ("(=CPU", {"host": 1000, "gpu0": 911 + 1000}),
    ],
)
def test_an_owner_may_say_by_name_what_lies_where(patterns, expected):
    assert where({"n-gpu-layers": "all", "override-tensor": patterns}, GPU) == expected


def test_a_part_in_two_places_is_counted_in_both_and_says_so():
    found = weights(SHAPE, {"n-gpu-layers": "all", "override-tensor": "ffn_up_exps=CPU"}, GPU)
    assert [(part["where"], part["bytes"], part["source"]) for part in found] == [
        ("gpu0", 911 + 1000, "bound"),
        ("host", 1000 + 90, "bound"),
    ]


def test_what_the_processor_reorders_is_a_part_of_its_own():
    assert repacked(SHAPE, {}, []) == 4 * 60 + 24 + 900  # the reordered output is a second copy of the table
    assert where({}, []) == {"host": 1000 + 10 + 1 + 1000 - 4 * 60 - 24}
    assert repacked(SHAPE, {}, [], machine="aarch64") == 4 * 60 + 24 + 900 + 30
    assert repacked(SHAPE, {"repack": False}, []) == 0
    assert repacked(SHAPE, {"n-gpu-layers": 3}, EMULATED) == 2 * 60 + 7
    assert repacked(SHAPE, {"n-gpu-layers": "all", "cpu-moe": True}, EMULATED) == 24
    assert repacked(SHAPE, {"n-gpu-layers": "all", "n-cpu-ffn": 2}, EMULATED) == 6
    # beside a card with pinned memory of its own, weights on the processor stay as they are in the file
    assert repacked(SHAPE, {"n-gpu-layers": 3}, GPU) == 0


def test_an_output_that_is_made_before_the_table_is_a_second_copy_unless_it_is_mapped():
    shape = {**SHAPE, "architecture": "gemma4", "repack_bytes": {}}
    assert where({"load-mode": "none"}, [], shape) == {"host": 2011 + 900}
    assert where({"load-mode": "mmap"}, [], shape) == {"host": 2011}


def test_an_encoder_has_no_output():
    assert where({}, GPU, {**SHAPE, "architecture": "nomic-bert"}) == {"host": 1000, "gpu0": 10 + 1 + 1000}


def test_layers_that_predict_further_tokens_are_not_loaded():
    shape = {**SHAPE, "architecture": "glm4moe", "hparams": {"nextn_predict_layers": 1}}
    assert (loaded(shape), loaded(shape, all_of_them=True)) == (3, 4)
    assert where({"spec-type": "draft-mtp"}, GPU, shape) == {"host": 1000, "gpu0": 911 + 1000}
    assert where({}, GPU, shape) == {"host": 1000, "gpu0": 911 + 600}
    assert loaded({**shape, "architecture": "graniteswitch"}) == 4
