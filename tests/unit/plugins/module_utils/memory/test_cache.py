# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import cache, unknown
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.memory import engine_answers

GPU = engine_answers.devices(1)


def model(architecture="llama", layers=4, **given):
    """A model with 2 heads of 64 elements: 512 bytes of f16 for a token and a layer."""
    shape = {
        "architecture": architecture,
        "context_length": 8192,
        "block_count": layers,
        "embedding_length": 256,
        "head_count": 4,
        "head_count_kv": 2,
        "key_length": 64,
        "value_length": 64,
        "hparams": {},
    }
    named = {key: given.pop(key) for key in list(given) if key in shape}
    return {**shape, **named, "hparams": {key.replace("__", "."): value for key, value in given.items()}}


def sizes(shape, devices=(), **options):
    """Bytes by place and kind of one slot with 8192 tokens."""
    options = {"ctx-size": 8192, "parallel": 1, **{key.replace("_", "-"): value for key, value in options.items()}}
    found = cache(shape, options, list(devices))
    assert {part["source"] for part in found} <= {"bound" if unknown(shape) else "computed"}
    return {f"{part['where']} {part['kind']}": part["bytes"] for part in found}


LAYER = 8192 * 512


@pytest.mark.parametrize(("shape", "answer", "exact"), engine_answers.CASES)
@pytest.mark.parametrize("kind", ["kv", "recurrent"])
def test_the_engine_says_the_same(shape, answer, exact, kind):
    devices = engine_answers.devices(answer["devices"])
    found = {place: kinds.get(kind, 0) for place, kinds in answer["found"].items()}
    parts = [part for part in cache(shape, answer["options"], devices) if part["kind"] == kind]
    assert engine_answers.agree({part["where"]: part["bytes"] / engine_answers.MIB for part in parts}, found, exact)
    assert {part["source"] for part in parts} <= {"computed"}


def test_a_cache_lies_where_its_layer_lies():
    assert sizes(model(), GPU, n_gpu_layers=3) == {"gpu0 kv": 2 * LAYER, "host kv": 2 * LAYER}
    assert sizes(model(), GPU, kv_offload=False) == {"host kv": 4 * LAYER}
    assert sizes(model(), GPU, n_gpu_layers="all", cpu_moe=True) == {"gpu0 kv": 4 * LAYER}


def test_types_of_keys_and_values():
    assert sizes(model(), cache_type_k="q8_0", cache_type_v="q4_0") == {"host kv": 4 * 8192 * (136 + 72)}


def test_heads_that_differ_from_layer_to_layer():
    assert sizes(model(head_count_kv=[2, 0, 1, 2])) == {"host kv": 5 * LAYER // 2}
    # without flash attention values lie across, as wide as the widest layer's
    assert sizes(model(head_count_kv=[2, 0, 1, 2]), flash_attn="off") == {"host kv": 5 * LAYER // 4 + 4 * LAYER // 2}


def test_latent_attention_keeps_keys_alone():
    latent = model(
        "deepseek2", head_count_kv=1, key_length=576, attention__key_length_mla=192, attention__value_length_mla=128
    )
    assert sizes(latent) == {"host kv": 4 * 8192 * 576 * 2}
    # converted before llama.cpp could: every head's keys and values
    assert sizes(model("deepseek2", head_count_kv=4, key_length=192, value_length=128)) == {
        "host kv": 4 * 8192 * 4 * 320 * 2
    }


@pytest.mark.parametrize(
    ("architecture", "full"),
    [
        ("gemma3", [5]),
        ("gemma2", [1, 3, 5, 7]),
        ("cohere2moe", [0, 4]),
        ("phi3", list(range(8))),  # the engine has them switched off
        ("qwen2", list(range(8))),
    ],
)
def test_windows_that_the_file_does_not_list(architecture, full):
    shape = model(architecture, layers=8, attention__sliding_window=512)
    assert sizes(shape) == {"host kv": len(full) * LAYER + (8 - len(full)) * 1024 * 512}
    assert sizes(shape, swa_full=True) == {"host kv": 8 * LAYER}


def test_a_window_of_many_slots():
    shape = model("gpt-oss", attention__sliding_window=512)
    # 512 tokens for each of 3 slots and a batch, in one cache; or a cache for each slot
    assert sizes(shape, parallel=3, kv_unified=True) == {"host kv": 2 * LAYER + 2 * 2048 * 512}
    assert sizes(shape, parallel=2) == {"host kv": 2 * LAYER + 2 * 2 * 1024 * 512}


def test_a_file_may_list_its_windows_or_say_how_often():
    shape = model("gemma3", attention__sliding_window=512, attention__sliding_window_pattern=2)
    assert sizes(shape) == {"host kv": 2 * LAYER + 2 * 1024 * 512}
    listed = [True, True, True, False]
    shape = model("gemma4", attention__sliding_window=512, attention__sliding_window_pattern=listed)
    assert sizes(shape) == {"host kv": LAYER + 3 * 1024 * 512}
    every = [True] * 4
    shape = model("gemma4", attention__sliding_window=512, attention__sliding_window_pattern=every)
    assert sizes(shape) == {"host kv": 4 * 1024 * 512}


def test_layers_that_use_the_cache_of_others():
    shape = model(
        "gemma4",
        attention__sliding_window=512,
        attention__sliding_window_pattern=[True, False, True, False],
        attention__shared_kv_layers=2,
    )
    assert sizes(shape) == {"host kv": LAYER + 1024 * 512}


def test_layers_that_predict_further_tokens_have_none():
    assert sizes(model("glm4moe", nextn_predict_layers=1)) == {"host kv": 3 * LAYER}


def test_blocks_that_are_gone_through_twice_have_two():
    assert sizes(model("nanbeige", num_loops=2)) == {"host kv": 8 * LAYER}


def test_encoders_keep_nothing():
    assert sizes(model("nomic-bert", attention__causal=False)) == {}


def test_states():
    # token shift: 2 rows of the width; a matrix for each head
    assert sizes(model("rwkv7", wkv__head_size=64), parallel=3) == {"host recurrent": 4 * 3 * 4 * (2 * 256 + 64 * 256)}
    mamba = {"ssm__conv_kernel": 4, "ssm__inner_size": 512, "ssm__state_size": 16}
    assert sizes(model("mamba", **mamba)) == {"host recurrent": 4 * 4 * (3 * (512 + 0) + 16 * 512)}
    state = 4 * (3 * (512 + 2 * 2 * 16) + 16 * 512)
    hybrid = model("qwen3next", layers=8, ssm__group_count=2, **mamba)
    assert sizes(hybrid) == {"host kv": 2 * LAYER, "host recurrent": 6 * state}
    assert sizes(model("qwen3next", layers=8, ssm__group_count=2, full_attention_interval=2, **mamba)) == {
        "host kv": 4 * LAYER,
        "host recurrent": 4 * state,
    }
    heads = model("granitehybrid", head_count_kv=[0, 2, 0, 0], ssm__group_count=2, **mamba)
    assert sizes(heads) == {"host kv": LAYER, "host recurrent": 3 * state}
    both = model("falcon-h1", ssm__group_count=2, **mamba)
    assert sizes(both) == {"host kv": 4 * LAYER, "host recurrent": 4 * state}


def test_an_indexer_has_keys_of_its_own():
    latent = {
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
        "attention__indexer__key_length": 32,
    }
    shape = model("deepseek32", head_count_kv=1, **latent)
    assert sizes(shape) == {"host kv": 4 * 8192 * (64 + 32) * 2}
    shape = model("glm-dsa", head_count_kv=1, attention__indexer__types=[1, 0, 0, 0], **latent)
    assert sizes(shape) == {"host kv": 8192 * (4 * 64 + 32) * 2}


def test_what_is_not_known_is_an_upper_bound_that_says_so():
    assert unknown(model()) == []
    new = model("newest", attention__sliding_window=512)
    assert unknown(new) == ["The architecture newest is not known: every layer is counted with a full cache."]
    assert sizes(new) == {"host kv": 4 * LAYER}
    further = model("gemma3", attention__sliding_window=512, attention__novelty=3)
    assert unknown(further) == [
        "The key gemma3.attention.novelty is not known: every layer is counted with a full cache."
    ]
    assert sizes(further) == {"host kv": 4 * LAYER}
    silent = model("gemma4", attention__sliding_window=512)
    assert "does not say which layers have a sliding window" in unknown(silent)[0]
    assert sizes(silent) == {"host kv": 4 * LAYER}
    mixed = model("newest", ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16)
    assert sizes(mixed) == {"host kv": 4 * LAYER, "host recurrent": 4 * 4 * (3 * 512 + 16 * 512)}


def test_layers_that_predict_further_tokens_have_a_context_of_their_own_when_they_are_used():
    """As llama-server 0.7.0 said of GLM 4.5 Air: 46 layers of 64 MiB, and one more in the second context."""
    shape = model("glm4moe", layers=47, head_count_kv=8, key_length=128, value_length=128, nextn_predict_layers=1)
    assert sizes(shape, ctx_size=16384, parallel=2, spec_type="draft-mtp") == {
        "host kv": 2944 << 20,
        "host draft": 64 << 20,
    }


def test_states_that_can_be_taken_back_are_there_several_times():
    """As llama-server 0.7.0 said of Qwen3.5 122B: 298.12 MiB, and 1192.50 with room for three tokens."""
    shape = model(
        "qwen35moe",
        layers=48,
        ssm__conv_kernel=4,
        ssm__group_count=16,
        ssm__inner_size=8192,
        ssm__state_size=128,
    )
    once = sizes(shape, parallel=2)["host recurrent"]
    assert round(once / (1 << 20), 3) == 298.125
    assert sizes(shape, parallel=2, spec_type="draft-mtp")["host recurrent"] == 4 * once
    assert sizes(shape, parallel=2, spec_type="draft-mtp", spec_draft_n_max=1)["host recurrent"] == 2 * once
    assert sizes(shape, parallel=2, spec_type="ngram-mod")["host recurrent"] == once
