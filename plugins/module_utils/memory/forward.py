# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The forward pass of a model as a graph of tensors with sizes, in the order in which llama.cpp 0.7.0 builds it.

Only what needs room is there: a bias, a norm's weight or a rotation is computed in place and left out where nothing
follows from it. What llama.cpp calls an architecture is a row of FAMILIES here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ansible_collections.homelab.inference.plugins.module_utils.memory.graph import (
    HOST,
    Graph,
    Tensor,
    given,
    stored,
    view,
)

F32, F16, I32, I64 = 4, 2, 4, 8


@dataclass(frozen=True)
class Family:
    """How an architecture computes."""

    fused: bool = False  # queries, keys and values come out of one matrix
    head_norm: bool = False  # queries and keys are normed for each head
    post_norm: bool = False  # what attention and feed-forward give is normed before it is added
    scaled: bool = False  # the embeddings are multiplied first
    gate: str = "parallel"  # feed-forward: parallel, fused (gate and up in one matrix), none
    late: bool = False  # the rows that are asked for are picked after the last layer and not in it
    normed_weights: bool = True  # the experts' weights are made to sum up to one
    softmax_late: bool = False  # the experts' weights go through a softmax after the choice
    kind: str = "attention"  # attention, latent, gemma4, delta, encoder
    paired: bool = False  # a delta net's beta and alpha come out of one matrix


PLAIN, UNGATED = Family(), Family(gate="none")
NORMED = Family(head_norm=True)
DELTA = Family(head_norm=True, kind="delta")
# Those in the first part were compared with the engine in the shapes of published models, those in the second part in
# the small models of its own test for all architectures.
FAMILIES = {
    "llama": PLAIN,
    "mistral3": PLAIN,
    "qwen2": PLAIN,
    "qwen2vl": PLAIN,
    "qwen3": NORMED,
    "qwen3vl": NORMED,
    "qwen3moe": NORMED,
    "qwen3vlmoe": NORMED,
    "phi3": Family(fused=True, gate="fused"),
    "gemma3": Family(head_norm=True, post_norm=True, scaled=True),
    "gpt-oss": Family(normed_weights=False, softmax_late=True),
    "glm4moe": PLAIN,
    "deepseek2": Family(kind="latent"),
    "gemma4": Family(head_norm=True, post_norm=True, scaled=True, kind="gemma4"),
    "qwen3next": Family(head_norm=True, kind="delta", paired=True),
    "qwen35moe": DELTA,
    "qwen35": DELTA,
    "nomic-bert": Family(fused=True, kind="encoder"),
    # ---
    **dict.fromkeys(
        (
            *("afmoe", "baichuan", "bailingmoe", "bailingmoe2", "chatglm", "dbrx", "deci", "deepseek", "dots1"),
            *("ernie4_5-moe", "exaone", "exaone-moe", "exaone4", "gemma", "gemma2", "glm4", "granite", "granite_swa"),
            *("granitemoe", "grok", "grovemoe", "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2"),
            *("laguna", "maincoder", "maion-coder", "maple", "mellum", "mimo2", "minicpm", "minicpm3", "minimax-m2"),
            *("muse-glimmer", "nanbeige", "olmo", "olmo2", "olmoe", "openelm", "orion", "pangu-embedded", "phimoe"),
            *("plamo3", "qwen2moe", "qwen3tts", "refact", "seed_oss", "smollm3", "spark2_5", "stablelm", "xverse"),
        ),
        PLAIN,
    ),
    **dict.fromkeys(
        ("arcee", "codeshell", "jais2", "nemotron", "pockettts", "starcoder2"),
        UNGATED,
    ),
    "falcon": Family(fused=True, gate="none", late=True),
    "gptneox": Family(fused=True, gate="none"),
    "mistral4": Family(kind="latent"),
    "plamo": Family(late=True),
}
# Their experts are as wide as a dense part would be, whatever the file says.
EXPERTS_LIKE_DENSE = frozenset(("llama", "mistral3", "dbrx", "granite", "granitemoe", "minicpm", "olmoe", "phimoe"))


@dataclass(frozen=True)
class Layer:
    """One layer: where it lies and what it does."""

    device: int
    experts_device: int
    heads: int
    kv_heads: int
    key: int  # elements of one head
    value: int
    forward: int  # width of the dense feed-forward part, 0 for none
    experts: bool = False
    window: bool = False
    recurrent: bool = False
    own_values: bool = True  # values are not made of the keys
    forward_device: int = HOST


@dataclass(frozen=True)
class Pass:
    """Everything that the graph of one pass depends on."""

    family: Family
    width: int
    vocabulary: int
    tokens: int
    outputs: int
    sequences: int
    cells: int
    window_cells: int  # 0 where no layer has a window
    flash: bool
    rotated: tuple[bool, bool]  # whether quantised keys and values are turned first
    cache_on_host: bool
    output_device: int
    layers: tuple[Layer, ...]
    experts: int = 0
    used: int = 0
    expert_forward: int = 0
    merged: bool = False  # the experts' gate and up are one matrix
    shared_forward: int = 0
    positions: int = 1
    latent: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)  # q rank, kv rank, rope, key, value
    state: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)  # inner, state, groups, heads, convolution
    indexer: tuple[int, int] = (0, 0)  # heads and key of what chooses the tokens to attend to
    embedding: bool = False
    streams: int = 1
    unpacked: tuple[bool, bool] = (False, False)  # attention makes keys and values F16 again, all at once
    values_width: int = 0  # the widest layer's values


class Forward:
    """Builds the graph."""

    def __init__(self, model: Pass) -> None:
        self.model, self.graph = model, Graph()
        tokens = model.tokens
        self.positions = given(I32 * tokens * model.positions)
        self.rows = given(I32 * model.outputs)
        self.masks: dict[bool, Tensor] = {}
        self.indices: dict[tuple[bool, bool], Tensor] = {}
        self.turns: dict[tuple[bool, str], Tensor] = {}
        self.copy_main = given(I32 * model.sequences)
        self.copy_extra = given(0)

    # --- operations ---------------------------------------------------------------------------------------------

    def make(
        self,
        width: int,
        *reads: Tensor,
        pin: int | None = None,
        inplace: bool = False,
        rows: int = 0,
        size: int = F32,
    ) -> Tensor:
        """Return a new tensor of so many elements for each token."""
        rows = rows or self.model.tokens
        tensor = Tensor(size * width * rows, reads, (size, width, rows), inplace)
        tensor.pin = pin
        return tensor

    def norm(self, of: Tensor, width: int, device: int, rows: int = 0) -> Tensor:
        """A norm, which stays where its input is, and its weight."""
        made = self.make(width, of, inplace=True, rows=rows)
        return self.make(width, made, inplace=True, rows=rows, pin=device)

    def rope(self, of: Tensor, width: int) -> Tensor:
        return self.make(width, of, self.positions, inplace=True)

    # --- parts --------------------------------------------------------------------------------------------------

    def embeddings(self) -> Tensor:
        model = self.model
        start = self.graph.expand(self.make(model.width, given(I32 * model.tokens), pin=HOST))
        self.graph.expand(given(F32 * model.width * model.tokens))
        # Embeddings from elsewhere, with those of tokens put between them. Nobody reads them, so they stay.
        known = self.make(model.width, given(I32 * model.tokens), pin=HOST)
        mixed = self.make(model.width, given(F32 * model.width * model.tokens))
        placed = view(mixed)
        placed.plain = False
        placed.reads = [known, given(I64 * model.tokens), mixed]
        self.graph.expand(placed)
        if model.family.scaled:
            start = self.make(model.width, start, inplace=True)
        return start

    def mask(self, window: bool) -> Tensor:
        if window not in self.masks:
            model = self.model
            cells = model.window_cells if window else model.cells
            self.masks[window] = given((F16 if model.flash else F32) * cells * model.tokens)
        return self.masks[window]

    def index(self, window: bool, values: bool) -> Tensor:
        if (window, values) not in self.indices:
            count = self.model.tokens
            if values and not self.model.flash:
                count *= self.model.values_width
            self.indices[window, values] = given(I64 * count)
        return self.indices[window, values]

    def turn(self, of: Tensor, width: int, layer: Layer, which: str) -> Tensor:
        """Multiply with a Hadamard matrix, before quantising what goes into the cache."""
        window = layer.window
        if not self.model.rotated[which == "v"]:
            return of
        if (window, which) not in self.turns:
            edge = 64
            while which == "k" and layer.key % (2 * edge) == 0:
                edge *= 2
            self.turns[window, which] = given(F32 * edge * edge)
        return view(self.make(width, self.turns[window, which], view(of)))

    def attend(self, layer: Layer, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """Store keys and values, and weigh the values."""
        model, graph = self.model, self.graph
        where = HOST if model.cache_on_host else layer.device
        query = self.turn(query, layer.heads * layer.key, layer, "k")
        if key is not None and value is not None:
            key = self.turn(key, layer.kv_heads * layer.key, layer, "k")
            value = self.turn(value, layer.kv_heads * layer.value, layer, "v")
        keys, values = stored(where), stored(where)
        graph.expand(query)
        for tensor in (value, key) if model.window_cells == 0 else (key, value):
            if tensor is not None:
                graph.expand(tensor)
        if key is not None and value is not None:
            for cache, new, kind in ((keys, key, False), (values, value, True)):
                store = view(cache)
                store.plain = False
                store.reads = [view(new), self.index(layer.window, kind), cache]
                graph.expand(store)
        result = self.weigh(layer, query, view(keys), view(values), self.mask(layer.window))
        if model.rotated[1]:
            result = self.turn(result, layer.heads * layer.value, layer, "v")
        return result

    def weigh(self, layer: Layer, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, expand: int = 0) -> Tensor:
        model = self.model
        cells = model.window_cells if layer.window else model.cells
        looked = view(query)
        if model.flash:
            result = self.make(layer.heads * layer.value, looked, keys, values, mask)
            if layer.device != HOST:
                for turned, width in zip(model.unpacked, (layer.key, layer.value)):
                    result.size += F16 * turned * cells * model.streams * layer.kv_heads * width
            if expand:
                result = self.make(layer.heads * expand, view(result), pin=layer.device)
                result = self.make(layer.heads * expand, view(result))
            result = view(result)
        else:
            scores = self.make(cells * layer.heads, keys, looked)
            scores = self.make(cells * layer.heads, scores, mask, inplace=True)
            if expand:  # values are part of the keys here and are turned over
                values = self.make(1, view(values), rows=cells * layer.value, size=F16)
            result = self.make(layer.heads * layer.value, values, scores)
            if expand:
                result = self.make(layer.heads * expand, result, pin=layer.device)
            result = self.make(layer.heads * (expand or layer.value), view(result))
            if model.cache_on_host:
                result.pin = HOST
        return self.graph.expand(result)

    def projected(self, layer: Layer, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        queries, rows, values = layer.heads * layer.key, layer.kv_heads * layer.key, layer.kv_heads * layer.value
        if self.model.family.fused:
            whole = self.make(queries + rows + values, normed, pin=layer.device)
            return view(whole), view(whole), view(whole)
        query = view(self.make(queries, normed, pin=layer.device))
        key = view(self.make(rows, normed, pin=layer.device))
        return query, key, view(self.make(values, normed, pin=layer.device))

    def attention(self, layer: Layer, normed: Tensor) -> Tensor:
        model, family = self.model, self.model.family
        queries, rows = layer.heads * layer.key, layer.kv_heads * layer.key
        query, key, value = self.projected(layer, normed)
        if family.head_norm:
            query = self.norm(query, queries, layer.device)
        query = self.rope(query, queries)
        if family.head_norm:
            key = self.norm(key, rows, layer.device)
        key = self.rope(key, rows)
        result = self.attend(layer, query, key, value)
        return self.make(model.width, result, pin=layer.device)

    def forward(self, layer: Layer, of: Tensor, length: int, rows: int, device: int) -> Tensor:
        family = self.model.family
        if family.gate == "fused":
            act = self.make(length, self.make(2 * length, of, pin=device, rows=rows), rows=rows)
        elif family.gate == "none":
            act = self.make(length, self.make(length, of, pin=device, rows=rows), inplace=True, rows=rows)
        else:
            up = self.make(length, of, pin=device, rows=rows)
            gate = self.make(length, of, pin=device, rows=rows)
            act = self.make(length, gate, up, rows=rows)
        return self.make(self.model.width, act, pin=device, rows=rows)

    def mixture(self, layer: Layer, of: Tensor, rows: int, logits: Tensor | None = None) -> Tensor:
        model, family, graph = self.model, self.model.family, self.graph
        used, count, length, width = model.used, model.experts, model.expert_forward, model.width
        device = layer.experts_device
        if logits is None:
            logits = self.make(count, of, pin=layer.device, rows=rows)
        probs = logits
        if not family.softmax_late:
            probs = self.make(count, logits, inplace=True, rows=rows)
        order = self.make(count, probs, rows=rows)
        chosen = view(order)
        weights = self.make(used, view(probs), chosen, rows=rows)
        if family.softmax_late:
            weights = self.make(used, weights, inplace=True, rows=rows)
        if family.normed_weights:
            total = self.make(1, view(weights), rows=rows)
            total = self.make(1, total, inplace=True, rows=rows)
            weights = self.make(used, view(weights), total, inplace=True, rows=rows)
        graph.expand(weights)
        each = view(of)
        if model.merged:
            both = self.make(2 * length * used, each, chosen, pin=device, rows=rows)
            gate, up = view(both), view(both)
        else:
            up = self.make(length * used, each, chosen, pin=device, rows=rows)
            gate = self.make(length * used, each, chosen, pin=device, rows=rows)
        act = self.make(length * used, gate, up, rows=rows)
        out = self.make(width * used, act, chosen, pin=device, rows=rows)
        out = self.make(width * used, out, view(weights), inplace=True, rows=rows)
        graph.expand(out)
        parts = [graph.expand(view(out)) for _part in range(used)]
        result = parts[0]
        for part in parts[1:]:
            result = graph.expand(self.make(width, result, part, inplace=True, rows=rows))
        if used == 1:
            result = self.make(width, result, rows=rows)
        return result

    def feed(self, layer: Layer, of: Tensor, rows: int) -> Tensor:
        """The second half of a layer, dense or with experts."""
        model = self.model
        if not layer.experts:
            return self.forward(layer, of, layer.forward, rows, layer.forward_device)
        result = self.mixture(layer, of, rows)
        if model.shared_forward:
            shared = self.forward(layer, of, model.shared_forward, rows, layer.device)
            if model.family.kind == "delta":
                gate = self.make(1, of, pin=layer.device, rows=rows)
                gate = self.make(1, gate, inplace=True, rows=rows)
                shared = self.make(model.width, shared, gate, inplace=True, rows=rows)
            result = self.make(model.width, result, shared, inplace=True, rows=rows)
        return result

    def center(self, of: Tensor, device: int | None) -> Tensor:
        """A norm that takes the mean away first, which is never computed in place; its weight and bias."""
        width = self.model.width
        return self.make(width, self.make(width, of), inplace=True, pin=device)

    # --- whole passes -------------------------------------------------------------------------------------------

    def build(self) -> Graph:
        model, family, width = self.model, self.model.family, self.model.width
        if family.kind == "encoder":
            return self.encoder()
        start = self.embeddings()
        rows = model.tokens
        for number, layer in enumerate(model.layers):
            residual = start
            normed = self.norm(start, width, layer.device)
            if family.kind == "latent":
                made = self.latent(layer, normed)
            elif family.kind == "delta":
                self.graph.expand(normed)
                made = self.delta(layer, normed) if layer.recurrent else self.gated(layer, normed)
            elif family.kind == "gemma4":
                made = self.shared_keys(layer, normed)
            else:
                made = self.attention(layer, normed)
            if number == len(model.layers) - 1 and not family.late:
                rows = model.outputs
                made = self.make(width, made, self.rows, rows=rows)
                residual = self.make(width, residual, self.rows, rows=rows)
            if family.post_norm:
                made = self.norm(made, width, layer.device, rows)
            middle = self.make(width, made, residual, inplace=True, rows=rows)
            if family.kind == "gemma4" and layer.experts:
                made = self.both(layer, middle, rows)
            else:
                made = self.feed(layer, self.norm(middle, width, layer.device, rows), rows)
            if family.post_norm:
                made = self.norm(made, width, layer.device, rows)
            start = self.make(width, made, middle, inplace=True, rows=rows)
            if family.kind == "gemma4":
                start = self.make(width, start, inplace=True, rows=rows, pin=layer.device)
        return self.finish(start, rows)

    def finish(self, start: Tensor, rows: int) -> Graph:
        model = self.model
        if rows != model.outputs:
            start = self.make(model.width, start, self.rows, rows=model.outputs)
            rows = model.outputs
        result = self.norm(start, model.width, model.output_device, rows)
        if model.embedding:  # a vector for each sequence is all that is asked for
            result.output = True
            result = self.make(model.width, result, given(I32 * model.sequences), rows=model.sequences)
        else:
            result = self.make(model.vocabulary, result, pin=model.output_device, rows=model.outputs)
        self.graph.expand(result)
        return self.graph

    # --- further kinds of layers --------------------------------------------------------------------------------

    def latent(self, layer: Layer, normed: Tensor) -> Tensor:
        """Multi-head latent attention: keys that values are part of, common to all heads."""
        model, device = self.model, layer.device
        query_rank, rank, turned, key, value = model.latent
        heads = layer.heads
        if query_rank:
            query = self.norm(self.make(query_rank, normed, pin=device), query_rank, device)
            query = self.make(heads * key, query, pin=device)
        else:
            query = self.make(heads * key, normed, pin=device)
        pair = self.make(rank + turned, normed, pin=device)
        turned_key = self.make(turned, view(pair), self.positions, inplace=True)
        compressed = self.norm(view(pair), rank, device)
        turned_query = self.make(heads * turned, view(query), self.positions, inplace=True)
        absorbed = self.make(heads * rank, view(view(query)), pin=device)
        full = self.make(heads * (rank + turned), view(absorbed), turned_query)
        new = self.make(rank + turned, view(compressed), turned_key)
        cache = stored(HOST if model.cache_on_host else device)
        graph = self.graph
        graph.expand(full)
        graph.expand(compressed)
        graph.expand(new)
        store = view(cache)
        store.plain = False
        store.reads = [view(new), self.index(False, False), cache]
        graph.expand(store)
        wide = Layer(device, device, heads, 1, rank + turned, rank, 0)
        keys = view(cache)
        result = self.weigh(wide, full, keys, view(keys), self.mask(False), expand=value)
        return self.make(model.width, result, pin=device)

    def shared_keys(self, layer: Layer, normed: Tensor) -> Tensor:
        """Gemma 4: values are normed too; global layers make them of their keys."""
        device = layer.device
        queries, rows, values = layer.heads * layer.key, layer.kv_heads * layer.key, layer.kv_heads * layer.value
        query = self.rope(self.norm(view(self.make(queries, normed, pin=device)), queries, device), queries)
        key = self.make(rows, normed, pin=device)
        value = self.make(values, normed, pin=device) if layer.own_values else key
        value = self.make(values, view(value), inplace=True)
        key = self.rope(self.norm(view(key), rows, device), rows)
        return self.make(self.model.width, self.attend(layer, query, key, value), pin=device)

    def both(self, layer: Layer, middle: Tensor, rows: int) -> Tensor:
        """Gemma 4: a dense part beside the experts, each with norms of its own."""
        width, device = self.model.width, layer.device
        dense = self.forward(layer, self.norm(middle, width, device, rows), layer.forward, rows, device)
        dense = self.norm(dense, width, device, rows)
        routed = self.norm(middle, width, device, rows)
        router = self.make(
            width, self.make(width, middle, inplace=True, rows=rows), inplace=True, rows=rows, pin=device
        )
        logits = self.make(self.model.experts, router, pin=device, rows=rows)
        sparse = self.norm(self.mixture(layer, routed, rows, logits), width, device, rows)
        return self.make(width, dense, sparse, inplace=True, rows=rows)

    def gated(self, layer: Layer, normed: Tensor) -> Tensor:
        """Attention whose result goes through a gate that comes with the queries."""
        device = layer.device
        queries, rows = layer.heads * layer.key, layer.kv_heads * layer.key
        pair = self.make(2 * queries, normed, pin=device)
        key = view(self.make(rows, normed, pin=device))
        value = self.make(rows, normed, pin=device)
        query = self.rope(self.norm(view(pair), queries, device), queries)
        key = self.rope(self.norm(key, rows, device), rows)
        result = self.attend(layer, query, key, value)
        gate = self.make(queries, view(pair))
        gate = self.make(queries, gate, inplace=True)
        result = self.make(queries, result, gate, inplace=True)
        return self.make(self.model.width, result, pin=device)

    def delta(self, layer: Layer, normed: Tensor) -> Tensor:
        """A gated delta net: a convolution over the last tokens, and a state in place of keys."""
        model, device, graph = self.model, layer.device, self.graph
        inner, state, groups, heads, kernel = model.state
        channels = inner + 2 * groups * state
        head = inner // max(1, heads)
        mixed = self.make(channels, normed, pin=device)
        gate_in = self.make(inner, normed, pin=device)
        cached, sums = stored(device), stored(device)
        if not model.family.paired:
            beta = view(self.make(heads, normed, pin=device))
            alpha = view(self.make(heads, normed, pin=device))
        else:
            pair = self.make(2 * heads, normed, pin=device)
            beta = self.make(heads, view(pair))
            alpha = self.make(heads, view(pair))
        beta = self.make(heads, beta, inplace=True)
        decay = self.make(heads, alpha, inplace=True, pin=device)
        decay = self.make(heads, decay, inplace=True)
        decay = self.make(heads, decay, inplace=True, pin=device)
        last = self.state_rows(cached, (kernel - 1) * channels)
        sequences = model.sequences
        window = Tensor(F32 * channels * (model.tokens + (kernel - 1) * sequences), (view(last), view(mixed)))
        update = view(cached)
        update.plain = False
        update.reads = [view(window), cached]
        graph.expand(update)
        sum_rows = self.state_rows(sums, head * head * heads)
        convolved = self.make(channels, window, pin=device)
        convolved = self.make(channels, convolved, inplace=True)
        query = self.make(groups * state, view(convolved))
        key = self.make(groups * state, view(convolved))
        if groups != heads and model.family.paired:
            query = self.make(heads * state, view(query))
            key = self.make(heads * state, view(key))
        out = Tensor(
            F32 * (inner * model.tokens + head * head * heads * sequences),
            (
                view(query),
                view(key),
                view(convolved),
                view(decay),
                view(beta),
                view(sum_rows),
            ),
        )
        update = view(sums)
        update.plain = False
        update.reads = [view(out), sums]
        graph.expand(update)
        normal = self.norm(view(out), inner, device)
        gate = self.make(inner, view(gate_in), inplace=True)
        result = self.make(inner, normal, gate, inplace=True)
        return view(self.make(model.width, view(result), pin=device))

    def state_rows(self, cache: Tensor, elements: int) -> Tensor:
        """The states of the sequences of a batch; the others' are moved."""
        graph = self.graph
        zero = view(cache)
        zero.plain = False
        zero.reads = [cache]
        graph.expand(zero)
        rows = Tensor(F32 * elements * self.model.sequences, (cache, self.copy_main))
        graph.expand(rows)
        extra = Tensor(0, (cache, self.copy_extra))
        moved = view(cache)
        moved.plain = False
        moved.reads = [extra, cache]
        graph.expand(moved)
        return rows

    def encoder(self) -> Graph:
        """All tokens at once, each seeing all others; no cache, and one vector of the mean in the end."""
        model, width = self.model, self.model.width
        padded = -(-model.tokens // 256) * 256
        mask = given((F16 if model.flash else F32) * padded * model.tokens)
        start = self.make(width, self.embeddings(), inplace=True)
        start = self.center(start, model.layers[0].device)
        for layer in model.layers:
            rows = layer.kv_heads * layer.key
            query, key, value = self.projected(layer, start)
            query, key = self.rope(query, layer.heads * layer.key), self.rope(key, rows)
            for tensor in (query, key, value):
                self.graph.expand(tensor)
            if model.flash:
                keys = self.make(rows, view(self.make(rows, key, rows=padded)), rows=padded, size=F16)
                values = self.make(rows, view(self.make(rows, value, rows=padded)), rows=padded, size=F16)
                result = self.make(layer.heads * layer.value, view(query), keys, values, mask)
            else:
                values = self.make(rows, view(self.make(rows, value, rows=padded)), rows=padded)
                self.graph.expand(values)
                scores = self.make(padded * layer.heads, view(self.make(rows, key, rows=padded)), view(query))
                scores = self.make(padded * layer.heads, scores, mask, inplace=True)
                result = self.make(
                    layer.heads * layer.value, view(self.make(layer.heads * layer.value, values, scores))
                )
            self.graph.expand(result)
            made = self.make(width, view(result), pin=layer.device)
            middle = self.center(self.make(width, made, start, inplace=True), layer.device)
            made = self.forward(layer, middle, layer.forward, model.tokens, layer.forward_device)
            start = self.center(self.make(width, made, middle, inplace=True), layer.device)
        start.output = True
        turned = self.make(width, view(start))
        pooled = Tensor(F32 * width * model.sequences, (turned, given(F32 * model.tokens * model.sequences)))
        self.graph.expand(pooled)
        return self.graph
