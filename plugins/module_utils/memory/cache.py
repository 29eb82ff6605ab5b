# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many bytes the caches of a model take, and where: keys and values, and the states of recurrent layers.

The rules are those of llama.cpp (create_memory in src/llama-model.cpp, llama-hparams.cpp, llama-kv-cache*.cpp,
llama-memory-*.cpp and load_arch_hparams in src/models, read in 0.5.0 and measured with 0.7.0). Nearly all follow from
the numbers in the file; what the engine has written into its code for single architectures stands in the tables below.
"""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.layers import HOST, layer_count, places
from ansible_collections.homelab.inference.plugins.module_utils.memory.options import (
    Settings,
    pad,
    row_bytes,
    settings,
)
from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import ROUTER


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


KNOWN = _words(
    """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon chatglm
    codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 dflash
    dots1 dots3note dream eagle3 ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon falcon-h1 gemma
    gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4 glm4moe glm5-next gpt-oss gpt2 gptj
    gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe hrm_text hunyuan-dense hunyuan-moe
    hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3 k2-horizon kimi-k3 kimi-linear laguna
    lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder maion-coder mamba mamba2 maple mellum mimo2 minicpm
    minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 modern-bert mpt muse-glimmer nanbeige nemotron
    nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded
    phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe
    qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3
    spark2_5 stablelm starcoder starcoder2 step35 t5 t5encoder talkie wavtokenizer-dec xverse
    """
)
# Keys under these prefixes say how tokens see each other and what is kept of them; one that is not known may change it.
TELLING = ("attention.", "ssm.", "kda.", "wkv.", "shortconv.", "ple.")
UNDERSTOOD = _words(
    """
    attention.causal attention.clamp_kqv attention.compress_ratios attention.decay_lora_rank attention.gate_lora_rank
    attention.group_norm_groups attention.iclr_lora_rank attention.indexer.block_size attention.indexer.head_count
    attention.indexer.key_length attention.indexer.kpool attention.indexer.kpool_select_tail
    attention.indexer.local_blocks attention.indexer.top_k attention.indexer.types attention.key_length_mla
    attention.key_length_mla_swa attention.key_length_swa attention.kv_lora_rank attention.kv_lora_rank_swa
    attention.output_group_count attention.output_lora_rank attention.q_lora_rank attention.recurrent_layers
    attention.relative_buckets_count attention.rope_pattern attention.scale attention.shared_kv_layers
    attention.sliding_window attention.sliding_window_pattern attention.temperature_length
    attention.value_expert_count attention.value_expert_used_count attention.value_length_mla
    attention.value_length_mla_swa attention.value_length_swa attention.value_residual_mix_lora_rank ssm.conv_kernel
    ssm.dt_b_c_rms ssm.group_count ssm.inner_size ssm.state_size ssm.time_step_rank kda.head_dim kda.safe_gate
    wkv.head_size shortconv.l_cache ple.conv_kernel ple.eos_token_id ple.head_offsets ple.head_vocab_sizes
    ple.heads_per_ngram ple.image_token_id ple.layer_multipliers ple.layers ple.ngram_size
    """
)
# They keep nothing between calls: encoders, and models that write a text from all sides.
WITHOUT_CACHE = _words(
    """
    bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert wavtokenizer-dec modern-bert
    gemma-embedding dream llada llada-moe rnd1
    """
)
# Sliding windows: one layer in so many sees everything (0: none does, None: the file lists them), and whether it is the
# first or the last of them. A file may say otherwise. Architectures not named here see everything, whatever window
# their file names.
SLIDING: dict[str, tuple[int | None, bool]] = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "cohere2moe": (4, True),
    "deepseek4": (0, False),
    "dflash": (None, False),
    "dots3note": (None, False),
    "exaone-moe": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gemma4": (None, False),
    "gemma4-assistant": (None, False),
    "gpt-oss": (2, False),
    "granite_swa": (None, False),
    "laguna": (4, True),
    "lfm2": (0, False),
    "llama4": (4, False),
    "maion-coder": (None, False),
    "maple": (None, False),
    "mellum": (4, False),
    "mimo2": (None, False),
    "muse-glimmer": (4, False),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
    "spark2_5": (None, False),
    "step35": (None, False),
}
WINDOWS = {"exaone-moe": 128, "exaone4": 4096, "gemma2": 4096}  # where the file names none
FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}  # whatever the file names
# Every layer has a state and none has keys.
RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
# One layer in so many has keys, the others a state, where the file does not list them.
INTERVALS = {"minimax-01": 8, "qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4}
# Layers that predict further tokens have a cache like the others.
FURTHER_CACHED = frozenset(("bailingmoe3", "hy_v4", ROUTER))
# Their states can be taken back by some tokens.
ROLLBACK = frozenset(
    (
        "bailingmoe3",
        "deepseek4",
        "glm5-next",
        "kimi-k3",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "qwen35",
        "qwen35moe",
        "qwen4exp",
    )
)
# Rows that an indexer with pooled keys has for a token: key, pooled key, and with some its gate.
POOLED_ROWS = {"qwen4exp": 2, "glm5-next": 3}
MOST_POOLED_ROWS = 3
COMPRESSED = {4: "csa", 128: "hca"}  # DeepSeek 4: tokens in one row of a compressed cache
KINDS = ("kv", "recurrent", "draft")


def cache(shape: dict[str, Any], options: dict[str, Any], devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a part of each kind for each place that holds such; upper bounds where P(unknown) says why.

    Kinds: kv, recurrent, and draft for the cache of layers that predict further tokens.
    """
    chosen = settings(options, shape)
    layers = layer_count(shape)
    where = places(layers, chosen, devices) if chosen.kv_offload else [HOST] * (layers + 1)
    model = _Model(shape, chosen)
    sizes = model.sizes()
    source = "computed"
    if unknown(shape):
        source = "bound"
        sizes = [(max(kv, plain[0]), max(state, plain[1])) for (kv, state), plain in zip(sizes, model.everything())]
    sums: dict[tuple[str, str], int] = {}
    for place, both, further in zip(where, sizes, model.further_sizes()):
        for kind, size in zip(KINDS, (*both, further)):
            sums[place, kind] = sums.get((place, kind), 0) + size
    order = [*(device["id"] for device in devices), HOST]
    return [
        {"where": place, "kind": kind, "bytes": sums[place, kind], "source": source}
        for place in order
        for kind in KINDS
        if sums.get((place, kind))
    ]


def unknown(shape: dict[str, Any]) -> list[str]:
    """Return why what P(cache) says can only be an upper bound, as sentences; nothing when it is exact."""
    architecture, given = shape.get("architecture"), shape["hparams"]
    reasons = []
    if architecture not in KNOWN:
        reasons.append(f"The architecture {architecture} is not known: every layer is counted with a full cache.")
    for name in sorted(given):
        if name.startswith(TELLING) and name not in UNDERSTOOD:
            reasons.append(f"The key {architecture}.{name} is not known: every layer is counted with a full cache.")
    if SLIDING.get(str(architecture), (0, False))[0] is None and not isinstance(
        given.get("attention.sliding_window_pattern"), list
    ):
        reasons.append(
            f"The file of architecture {architecture} does not say which layers have a sliding window: "
            "every layer is counted with a full cache."
        )
    return reasons


class _Model:
    """The numbers of one model that its caches follow from, for one choice of settings."""

    def __init__(self, shape: dict[str, Any], chosen: Settings) -> None:
        self._shape, self._given, self._set = shape, shape["hparams"], chosen
        self._name = str(shape.get("architecture"))
        self._count = layer_count(shape)
        further = self._number("nextn_predict_layers")
        self._trunk = self._count - (further if further < self._count and self._name not in FURTHER_CACHED else 0)
        self._heads = self._layers(shape["head_count_kv"])
        if self._name == ROUTER:
            self._heads[-1] = 1
        self._sliding = self._sliding_layers()
        self._recurrent = self._recurrent_layers()

    def _number(self, key: str, default: int = 0) -> int:
        value = self._given.get(key)
        return default if value is None or isinstance(value, list) else int(value)

    def _layers(self, value: Any, default: int = 0) -> list[int]:
        """A number for each layer; a list goes on from its beginning where blocks are gone through again."""
        if isinstance(value, list):
            blocks = max(1, int(self._shape["block_count"] or 0))
            short = [int(item) for item in value[:blocks]] + [default] * (blocks - len(value))
            return [short[index % blocks] for index in range(self._count)]
        return [default if value is None else int(value)] * self._count

    @property
    def _window(self) -> int:
        window = self._given.get("attention.sliding_window")
        if self._name in FIXED_WINDOWS and window != 0 and (window or self._name == "llama4"):
            return FIXED_WINDOWS[self._name]
        return int(window) if isinstance(window, int) else WINDOWS.get(self._name, 0)

    def _sliding_layers(self) -> list[bool]:
        pattern = self._given.get("attention.sliding_window_pattern")
        none = [False] * self._count
        if self._name not in SLIDING or not self._window or (self._name == "exaone4" and self._trunk != 64):
            return none
        period, first = SLIDING[self._name]
        if isinstance(pattern, list):
            return [bool(item) for item in self._layers(pattern)]
        if isinstance(pattern, int) and period is not None:
            period = int(pattern)
        if period is None:
            return none
        return [
            index < self._trunk and (not period or (index % period != 0 if first else index % period < period - 1))
            for index in range(self._count)
        ]

    def _recurrent_layers(self) -> list[bool]:
        if not any(self._state_elements()):
            return [False] * self._count
        listed = self._given.get("attention.recurrent_layers")
        if self._name in RECURRENT or self._name == "falcon-h1":
            found = [True] * self._count
        elif listed is not None and self._name in INTERVALS:
            found = [bool(item) for item in self._layers(listed)]
        elif self._name in INTERVALS:
            interval = self._number("full_attention_interval", INTERVALS[self._name])
            found = [bool((index + 1) % max(1, interval)) for index in range(self._count)]
        else:
            forward = self._layers(self._given.get("feed_forward_length")) if self._mixed else [0] * self._count
            found = [not heads and not length for heads, length in zip(self._heads, forward)]
        return [index < self._trunk and recurrent for index, recurrent in enumerate(found)]

    @property
    def _mixed(self) -> bool:
        """Nemotron H has layers of one thing each: a state, keys, or feed-forward weights."""
        return self._name in ("nemotron_h", "nemotron_h_moe")

    def _attention_layers(self) -> list[bool]:
        if self._name in RECURRENT:
            return [False] * self._count
        kept = self._count
        if self._name == "gemma3n":
            kept = 20
        elif self._name == "gemma4":
            kept = self._count - self._number("attention.shared_kv_layers")
        forward = self._layers(self._given.get("feed_forward_length")) if self._mixed else [0] * self._count
        both = self._name == "falcon-h1"
        return [
            index < min(kept, self._trunk) and (both or not self._recurrent[index]) and not forward[index]
            for index in range(self._count)
        ]

    def _state_elements(self) -> tuple[int, int]:
        """Elements of a recurrent layer for one slot: of its last inputs and of its state (n_embd_r, n_embd_s)."""
        width = int(self._shape["embedding_length"] or 0)
        head_count = self._shape["head_count"] or 0
        heads = int(head_count[0] if isinstance(head_count, list) else head_count)
        convolution = self._number("ssm.conv_kernel")
        inner, state = self._number("ssm.inner_size"), self._number("ssm.state_size")
        if self._number("wkv.head_size"):
            return self._number("token_shift_count", 2) * width, width * self._number("wkv.head_size")
        if self._number("shortconv.l_cache"):
            return width * (self._number("shortconv.l_cache") - 1), state * inner
        head = self._number("kda.head_dim")
        if head:
            return 3 * (convolution - 1 if convolution else 3) * heads * head, head * head * heads
        inputs = max(0, convolution - 1) * (inner + 2 * self._number("ssm.group_count") * state)
        if self._name == "minimax-01":
            head = int(self._shape["key_length"] or 0)
            return inputs, head * head * heads
        return inputs, state * inner

    def _further_inputs(self, index: int) -> int:
        """Elements that a layer with embeddings of token sequences keeps beside its state (ple_conv_state)."""
        listed = self._given.get("ple.layers")
        if not isinstance(listed, list) or index not in listed:
            return 0
        kernel, sequence = self._number("ple.conv_kernel"), self._number("ple.ngram_size")
        width = int(self._shape["embedding_length"] or 0)
        return max(0, kernel - 1) * sequence * self._number("hyper_connection.count") * width

    @property
    def _latent(self) -> bool:
        """Keys that values are made from again: no values are kept."""
        return bool(self._number("attention.key_length_mla") and self._number("attention.value_length_mla"))

    def _lengths(self, index: int) -> tuple[int, int]:
        """Elements of a layer's keys and values for one token (n_embd_k_gqa, n_embd_v_gqa)."""
        key, value = int(self._shape["key_length"] or 0), int(self._shape["value_length"] or 0)
        if self._sliding[index]:
            key = self._number("attention.key_length_swa", key)
            value = self._number("attention.value_length_swa", value)
        return self._heads[index] * key, self._heads[index] * value

    def _row(self, keys: int, values: int) -> int:
        return row_bytes(self._set.type_k, keys) + row_bytes(self._set.type_v, values)

    def _window_cells(self, sequences: int) -> int:
        """Tokens that a layer with a sliding window keeps."""
        if self._set.swa_full:
            return self._set.cells
        return pad(min(self._set.cells, self._window * sequences + self._set.ubatch))

    def sizes(self) -> list[tuple[int, int]]:
        """Bytes of cache and of state for each layer."""
        if self._name in WITHOUT_CACHE:
            return [(0, 0)] * self._count
        if self._name == "deepseek4":
            return [self._compressed(index) for index in range(self._count)]
        streams = self._set.streams
        window = self._window_cells(self._set.slots if self._set.unified else 1)
        attention, indexed = self._attention_layers(), self._indexed_layers()
        widest = max((self._lengths(index)[1] for index in range(self._count)), default=0)
        result = []
        for index in range(self._count):
            size = 0
            if attention[index]:
                keys, values = self._lengths(index)
                if self._latent:
                    values = 0
                elif not self._set.flash_attention:
                    values = widest  # values lie across then, in rows of one length
                cells = window if self._sliding[index] else self._set.cells
                size = cells * streams * self._row(keys, values)
            if indexed[index]:
                size += self._set.cells * streams * self._row(*self._index_lengths(index))
            result.append((size, self._state(index) if self._recurrent[index] else 0))
        return result

    def _state(self, index: int) -> int:
        copies = self._set.slots * self._copies()
        return 4 * copies * (sum(self._state_elements()) + self._further_inputs(index))

    def _copies(self) -> int:
        return 1 + (self._set.rollback if self._name in ROLLBACK else 0)

    def further_sizes(self) -> list[int]:
        """Bytes of cache, in a context of their own, of the layers that predict further tokens."""
        result = [0] * self._count
        if not self._set.further or self._name == ROUTER:
            return result
        for index in range(self._count - min(self._number("nextn_predict_layers"), self._count), self._count):
            keys, values = self._lengths(index)
            values = 0 if self._latent else values
            row = row_bytes(self._set.further_type_k, keys) + row_bytes(self._set.further_type_v, values)
            result[index] = self._set.cells * self._set.streams * row
        return result

    def _indexed_layers(self) -> list[bool]:
        """Layers that keep keys of an indexer, which chooses the tokens that attention looks at."""
        none = [False] * self._count
        if not self._number("attention.indexer.key_length") or (
            self._name == "hy_v4" and not self._number("attention.indexer.top_k")
        ):
            return none
        attention = self._attention_layers()
        if self._name == "minimax-m3":
            first = self._number("leading_dense_block_count")
            return [index >= first and attention[index] for index in range(self._count)]
        types = self._given.get("attention.indexer.types")
        if types is None and self._name == "glm-dsa" and int(self._shape["context_length"] or 0) >= 1 << 20:
            # GLM 5.2, before files said it: layers 0 and 1, then every fourth one
            own = [index < 2 or (index - 2) % 4 == 0 for index in range(self._count)]
        elif types is None or self._name in ("deepseek32", "qwen4exp"):
            own = [True] * self._count
        else:
            own = [bool(item) for item in self._layers(types)]
        return [
            owns and attention[index] and not self._sliding[index] and index < self._trunk
            for index, owns in enumerate(own)
        ]

    def _index_lengths(self, index: int) -> tuple[int, int]:
        key = self._number("attention.indexer.key_length")
        if self._number("attention.indexer.kpool"):
            key *= POOLED_ROWS.get(self._name, MOST_POOLED_ROWS)
        if self._latent or any(self._recurrent):
            return key, 0
        return key, int(self._shape["value_length"] or 0)

    def _compressed(self, index: int) -> tuple[int, int]:
        """DeepSeek 4: a window of keys for each slot, rows that stand for 4 or 128 tokens, and what makes them."""
        streams, copies = self._set.slots, self._set.slots * self._copies()
        keys = self._lengths(index)[0]
        size = self._window_cells(1) * streams * self._row(keys, 0)
        state = 0
        ratio = self._layers(self._given.get("attention.compress_ratios"))[index]
        if index < self._trunk and ratio in COMPRESSED:
            cells = pad(max(1, -(-self._set.cells // ratio)))
            head, choosing = self._lengths(0)[0] // max(1, self._heads[0]), self._number("attention.indexer.key_length")
            size += cells * streams * self._row(keys, 0)
            if COMPRESSED[ratio] == "csa":
                size += cells * streams * self._row(choosing, 0)
                state = 2 * 4 * copies * 2 * ratio * 2 * (head + choosing)
            else:
                state = 2 * 4 * copies * ratio * head
        return size, state

    def everything(self) -> list[tuple[int, int]]:
        """The most that each layer can take: full caches of keys, values and indexer, and a state."""
        state = 4 * self._set.slots * (1 + self._set.rollback) * sum(self._state_elements())
        choosing = MOST_POOLED_ROWS * self._number("attention.indexer.key_length")
        key = max(int(self._shape["key_length"] or 0), self._number("attention.key_length_swa"))
        value = max(int(self._shape["value_length"] or 0), self._number("attention.value_length_swa"))
        cells = self._set.cells * self._set.streams
        heads = max([1, *self._heads])
        return [(cells * self._row(heads * key + choosing, heads * value), state)] * self._count
