# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan: pins, room, splitting, stability."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.module_utils.planner import quality, room
from ansible_collections.homelab.inference.plugins.plugin_utils import lab

MIB = 2**20


def shape(gib: float) -> dict[str, Any]:
    """Return the shape of a dense model of 32 layers whose cache takes 128 KiB for each token, with so many weights."""
    table = 128 * MIB
    layer = int((gib * 2**30 - 2 * table) // 32)
    return {
        "architecture": "llama",
        "quant": "Q4_K_M",
        "parameters": 8 * 10**9,
        "context_length": 131072,
        "block_count": 32,
        "embedding_length": 4096,
        "head_count": 32,
        "head_count_kv": 8,
        "key_length": 128,
        "value_length": 128,
        "expert_count": 0,
        "expert_used_count": 0,
        "pooling": None,
        "tokenizer": "llama",
        "vocab_size": 32000,
        "tied_output": False,
        "weights_bytes": 2 * table + 32 * layer,
        "input_bytes": table,
        "embedding_bytes": table,
        "output_bytes": table,
        "other_bytes": 0,
        "block_bytes": [layer] * 32,
        "expert_bytes": [],
        "ffn_bytes": [],
        "repack_bytes": {},
        "hparams": {"feed_forward_length": 14336},
    }


def gpu(number: int, mib: int, vendor: str = "nvidia", kind: str = "dedicated") -> dict[str, Any]:
    return {
        "id": f"gpu{number}",
        "vendor": vendor,
        "name": "card",
        "memory_mib": mib,
        "memory_kind": kind,
        "cap_mib": None,
    }


def node(*devices: dict[str, Any], memory: int = 65536, **words: Any) -> dict[str, Any]:
    return {
        "devices": list(devices),
        "memory_mib": memory,
        "presence": "always",
        "library": [],
        "ports": [],
        "reservations": {},
        **words,
    }


def make(
    models: dict[str, Any], nodes: dict[str, Any], gib: float = 4, previous: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return placement.plan(*inputs(models, gib), nodes, previous or [])


def inputs(models: dict[str, Any], gib: float = 4) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a registry in normal form and its files."""
    registry = lab.models(
        {"lab": {"lab_models": {name: {"source": {"file": "/x"}, **model} for name, model in models.items()}}}
    )
    resolved = {
        name: {"files": [{"name": f"{name}.gguf", "size": int(gib * 2**30), "sha256": None}], "shape": shape(gib)}
        for name in registry
    }
    return registry, resolved


def test_one_gpu_before_a_split_before_the_processor() -> None:
    plan = make({"chat": {"context": 8192}}, {"a": node(), "b": node(gpu(0, 8192), gpu(1, 16384))})
    (instance,) = plan["instances"]
    assert (instance["node"], instance["devices"], instance["backend"]) == ("b", ["gpu1"], "cuda")
    # 4 GiB of weights without the token table, and 2 GiB of KV; what is above them are buffers and the driver.
    assert 4096 - 128 + 2048 < instance["memory"]["gpu1"] < 4096 + 2048 + 1024
    assert instance["server_options"] == {
        "ctx-size": 16384,
        "parallel": 2,
        "kv-unified": False,
        "n-gpu-layers": "all",
        "cache-type-k": "f16",
        "cache-type-v": "f16",
        "kv-offload": True,
        "flash-attn": "on",
        "swa-full": False,
        "batch-size": 2048,
        "ubatch-size": 512,
        "load-mode": "auto",
        "repack": True,
        "cache-ram": 0,
        "ctx-checkpoints": 2,
    }
    assert (instance["fit"], instance["start"], instance["quality"], plan["value"]) == ("one_gpu", 1, 1.0, 50.0)


def test_a_model_too_large_for_one_card_is_split_by_room() -> None:
    """Mission S0-M2: 19 GB on two cards of 16 GB."""
    plan = make(
        {"gemma": {"context": 8192, "nodes": "helium"}}, {"helium": node(gpu(0, 16384), gpu(1, 16384))}, gib=17.7
    )
    (instance,) = plan["instances"]
    assert instance["devices"] == ["gpu0", "gpu1"]
    assert instance["server_options"]["tensor-split"] and instance["fit"] == "split"
    assert all(8192 < instance["memory"][name] <= 16384 for name in ("gpu0", "gpu1"))


def test_the_ladder_goes_down_until_it_fits() -> None:
    plan = make({"chat": {"context": [131072, 65536, 8192], "slots": 1, "kv": "f16"}}, {"a": node(gpu(0, 8192))})
    assert plan["instances"][0]["server_options"]["ctx-size"] == 8192
    plan = make({"chat": {"slots": 1}}, {"a": node(gpu(0, 24576))})
    assert plan["instances"][0]["server_options"]["ctx-size"] == 32768


def test_a_promise_is_kept_or_refused() -> None:
    plan = make({"chat": {"context": 131072, "slots": 1, "kv": "f16"}}, {"a": node(gpu(0, 8192), memory=8192)})
    assert plan["instances"] == []
    (refusal,) = plan["refused"]
    assert refusal["model"] == "chat" and "needs" in refusal["reason"] and "of a has" in refusal["reason"]
    assert refusal["deficit_mib"] == refusal["needed_mib"] - refusal["available_mib"] > 0
    change = refusal["change"]
    assert change["key"] == "lab_models.chat.context"
    less = make({"chat": {"context": change["value"], "slots": 1, "kv": "f16"}}, {"a": node(gpu(0, 8192), memory=8192)})
    assert len(less["instances"]) == 1 and not less["refused"]


def test_reservations_and_what_was_placed_before_are_taken_off() -> None:
    both = {"first": {"context": 8192, "slots": 1, "priority": 90}, "second": {"context": 8192, "slots": 1}}
    plan = make(both, {"a": node(gpu(0, 8192), gpu(1, 8192), reservations={"gpu1": 8192})})
    first, second = plan["instances"]
    assert (first["name"], first["devices"], first["fit"]) == ("first", ["gpu0"], "one_gpu")
    assert "gpu1" not in second["memory"] and second["fit"] == "layers_on_cpu"
    assert plan["devices"]["a"]["gpu1"]["left_mib"] == 0
    assert first["memory"]["gpu0"] + second["memory"]["gpu0"] == plan["devices"]["a"]["gpu0"]["planned_mib"] <= 8192


def test_replicas_go_to_different_nodes_and_each_means_each() -> None:
    nodes = {"a": node(), "b": node(), "c": node(presence="guest")}
    plan = make({"two": {"context": 8192, "replicas": 2}, "all": {"context": 8192, "replicas": "each"}}, nodes)
    assert {(one["name"], one["node"]) for one in plan["instances"]} == {
        ("two", "a"),
        ("two-2", "b"),
        ("all", "a"),
        ("all-2", "b"),
        ("all-3", "c"),
    }


def test_names_ports_and_homes_stay_when_others_come_and_go() -> None:
    nodes = {"a": node(ports=[8080]), "b": node()}
    first = make({"one": {"context": 8192}, "two": {"context": 8192, "replicas": 2}}, nodes)["instances"]
    kept = {one["name"]: (one["node"], one["port"]) for one in first}
    assert kept == {"one": ("a", 8081), "two": ("a", 8082), "two-2": ("b", 8080)}
    more = {"new": {"context": 8192, "priority": 90}, "two": {"context": 8192, "replicas": 2}}
    second = {one["name"]: (one["node"], one["port"]) for one in make(more, nodes, previous=first)["instances"]}
    assert second == {"new": ("a", 8081), "two": ("a", 8082), "two-2": ("b", 8080)}
    assert make(more, nodes, previous=first) == make(more, nodes, previous=first)


def test_a_server_stays_on_its_card_when_another_becomes_emptier() -> None:
    nodes = {"a": node(gpu(0, 16384), gpu(1, 16384))}
    models = {
        "big": {"context": 32768, "slots": 1},
        "mid": {"context": 8192, "slots": 1},
        "low": {"context": 8192, "slots": 1},
    }
    first = make(models, nodes)["instances"]
    where = {one["name"]: one["devices"] for one in first}
    assert where == {"big": ["gpu0"], "mid": ["gpu1"], "low": ["gpu1"]}
    models["big"]["context"] = 8192
    models["mid"]["context"] = 32768
    assert {one["name"]: one["devices"] for one in make(models, nodes, previous=first)["instances"]} == where


def test_servers_make_room_where_they_are_before_one_of_them_leaves_the_gpu() -> None:
    nodes = {"a": node(gpu(0, 13800), gpu(1, 16384)), "b": node(gpu(0, 16384))}
    small = {"context": [16384, 8192], "slots": 1, "priority": 1, "nodes": ["a"]}
    models = {"large": {"context": 8192, "nodes": ["b"]}, **dict.fromkeys(("one", "two", "three", "four"), small)}
    first = make(models, nodes)["instances"]
    where = {one["name"]: one["devices"] for one in first}
    assert sorted(where.values()) == [["gpu0"]] * 3 + [["gpu1"]] * 2
    # Enough for two with less context, and not for one with more and one with less; and a plan that is worth little
    # more as a whole does not take the place of the one in force.
    crowded = {**nodes, "a": node(gpu(0, 13800), {**gpu(1, 16384), "used_mib": 4500})}
    second = make(models, crowded, previous=first)["instances"]
    assert {one["name"]: one["devices"] for one in second} == where
    assert sorted(one["quality"] for one in second) == [0.98, 0.98, 1.0, 1.0, 1.0]


def test_of_the_servers_on_an_emulated_gpu_one_loads_at_a_time() -> None:
    models = {name: {"context": 4096, "slots": 1} for name in ("one", "two", "three")}
    registry, resolved = inputs(models)
    for file in resolved.values():
        output = 3 * 2**30
        layer = (file["shape"]["weights_bytes"] - output - file["shape"]["input_bytes"]) // 32
        file["shape"].update(output_bytes=output, block_bytes=[layer] * 32)
    plan = placement.plan(registry, resolved, {"a": node(gpu(0, 65536, "emulated"))}, [])
    taken = [one["memory"]["gpu0"] for one in plan["instances"]]
    (staging,) = [part for one in plan["instances"] for part in one["parts"] if part["kind"] == "staging"]
    assert staging["bytes"] > 2**30
    assert taken[0] - taken[1] in (staging["bytes"] // MIB, staging["bytes"] // MIB + 1) and taken[1] == taken[2]
    assert plan["devices"]["a"]["gpu0"]["planned_mib"] == sum(taken)


def test_a_file_that_lies_on_the_node_is_used_there() -> None:
    size = 4 * 2**30
    entry = {
        "library": "/srv/models",
        "name": "chat.gguf",
        "path": "deep/chat.gguf",
        "size": size,
        "sha256": None,
        "shards": [],
    }
    other = {**entry, "size": 7, "library": "/other", "path": "chat.gguf"}
    plan = make({"chat": {"context": 8192}}, {"a": node(library=[other, entry])})
    assert plan["instances"][0]["library"] == {"library": "/srv/models", "path": "deep/chat.gguf"}
    assert make({"chat": {"context": 8192}}, {"a": node(library=[other])})["instances"][0]["library"] is None


def test_graphics_built_into_the_processor_are_left_alone() -> None:
    """A Ryzen 9700X shows its own graphics beside its Quadros, a NUC Intel's alone; Strix Halo's is the machine."""
    quadro, ryzen, nuc = gpu(0, 16384), gpu(1, 32768, "amd", "unified"), gpu(0, 8192, "intel", "unified")
    assert room.worth_using([quadro, ryzen]) == [quadro]
    assert room.worth_using([nuc]) == []
    assert room.worth_using([ryzen]) == [ryzen]
    assert room.worth_using([gpu(0, 1, "apple", "unified")])


def test_backends_by_vendor() -> None:
    assert room.backend(gpu(0, 1, "amd")) == "rocm"
    assert room.backend(gpu(0, 1, "amd", "unified")) == "vulkan"
    assert room.backend(gpu(0, 1, "tegra", "unified")) == "cuda"


def test_an_embedding_model_takes_its_whole_context_in_one_batch() -> None:
    plan = make({"vectors": {"categories": ["embed"], "context": 2048}}, {"a": node()}, gib=0.3)
    options = plan["instances"][0]["server_options"]
    assert options["ubatch-size"] == options["batch-size"] == 2048


def on_demand(**words: Any) -> dict[str, Any]:
    return {"context": 8192, "slots": 1, "kv": "f16", "keep": "on-demand", **words}


def test_the_port_of_models_that_take_turns_is_the_declared_one_and_stays() -> None:
    small = {"a": node(gpu(0, 8192), memory=2048)}
    plan = make({"one": on_demand(), "two": on_demand(port=9000)}, small, gib=5)
    assert [(one["turns"], one["port"]) for one in plan["instances"]] == [(["two"], 9000), (["one"], 9000)]
    plan = make({"one": on_demand(), "two": on_demand()}, small, gib=5)
    before = [{**one, "port": 8099} for one in plan["instances"]]
    again = make({"one": on_demand(), "two": on_demand()}, small, gib=5, previous=before)
    assert {one["port"] for one in again["instances"]} == {8099}
    # When there is room for both, the one that their server is named after keeps its port, or both would want it.
    large = {"a": node(gpu(0, 16384), memory=2048)}
    always = on_demand(keep="always")
    apart = make({"two": always, "one": always}, large, gib=5, previous=before)
    assert {one["name"]: (one["turns"], one["port"]) for one in apart["instances"]} == {
        "two": ([], 8080),
        "one": ([], 8099),
    }


def test_models_on_demand_take_turns_where_they_do_not_fit_together() -> None:
    small = {"a": node(gpu(0, 8192), memory=4096)}
    plan = make({"one": on_demand(), "two": on_demand(), "three": on_demand()}, small, gib=5)
    turns = {one["name"]: one["turns"] for one in plan["instances"] if one["fit"] == "turns"}
    assert len(turns) >= 2
    for name, others in turns.items():
        assert sorted([name, *others]) == sorted(turns)
    # They are behind one port, of one server.
    assert len({one["port"] for one in plan["instances"] if one["fit"] == "turns"}) == 1
    # The group takes what its largest member takes, not the sum.
    card = plan["devices"]["a"]["gpu0"]
    assert card["planned_mib"] <= 8192 - card["reserved_mib"]
    assert sum(one["memory"]["gpu0"] for one in plan["instances"]) > 8192
    assert all(one["turns"] == [] for one in make({"one": on_demand()}, small, gib=5)["instances"])
    tiny = {"a": node(gpu(0, 8192), memory=1024)}
    always = make({"one": on_demand(keep="always"), "two": on_demand(keep="always")}, tiny, gib=5)
    assert [one["name"] for one in always["instances"]] == ["one"] and always["refused"][0]["change"]


def test_unified_memory_is_one_bin_with_a_cap_of_its_own() -> None:
    mac = {**gpu(0, 65536, "apple", "unified"), "cap_mib": 16384}
    words = {"context": 8192, "slots": 1, "kv": "f16"}
    plan = make({"one": words, "two": words}, {"m": node(mac, memory=65536)}, gib=12)
    assert [one["fit"] for one in plan["instances"]].count("one_gpu") == 1
    books = plan["devices"]["m"]
    assert books["gpu0"]["size_mib"] == 16384 and books["gpu0"]["left_mib"] >= 0
    everything = sum(sum(one["memory"].values()) for one in plan["instances"])
    assert books["host"]["planned_mib"] == everything
    # What Metal may take at most is raised by a word, and the refusal says which.
    capped = {**gpu(0, 98304, "apple", "unified"), "cap_mib": 73728}
    big = {"big": {"context": 8192, "slots": 1, "kv": "f16", "nodes": "m"}}
    tight = make(big, {"m": node(capped, memory=98304, reservations={"host": 20000})}, gib=74)
    assert all(one["fit"] != "one_gpu" for one in tight["instances"])


def test_a_guest_is_never_the_only_home() -> None:
    nodes = {"rig": node(gpu(0, 24576), presence="guest"), "nuc": node()}
    one = make({"chat": {"context": 8192, "nodes": ["rig", "nuc"]}}, nodes)["instances"]
    assert [server["node"] for server in one] == ["nuc"]
    two = make({"chat": {"context": 8192, "nodes": ["rig", "nuc"], "replicas": 2}}, nodes)["instances"]
    assert sorted(server["node"] for server in two) == ["nuc", "rig"]


def test_what_others_hold_is_planned_around_and_its_jitter_moves_nothing() -> None:
    models = {"one": {"context": 8192}, "two": {"context": 8192, "priority": 60}}
    cards = [{**gpu(0, 16384), "used_mib": 6000}, {**gpu(1, 16384), "used_mib": 200}]
    nodes = {"a": node(*cards)}
    first = make(models, nodes)
    assert first["devices"]["a"]["gpu0"]["others_mib"] == 6000
    registry, resolved = inputs(models)
    for jitter in (-160, -50, 90, 160):
        now = {"a": node(*({**card, "used_mib": card["used_mib"] + jitter} for card in cards))}
        again = placement.plan(registry, resolved, now, first["instances"], previous_nodes=first["nodes"])
        assert again == first
    more = {"a": node(*({**card, "used_mib": 13000} for card in cards))}
    later = placement.plan(registry, resolved, more, first["instances"], previous_nodes=first["nodes"])
    assert later["devices"]["a"]["gpu0"]["others_mib"] == 13000 and later != first
    # A reservation whose owner is running counts once.
    held = {"a": node({**gpu(0, 16384), "used_mib": 4500}, reservations={"gpu0": 4096})}
    assert make(models, held)["devices"]["a"]["gpu0"]["others_mib"] == 404
    # Programs come and go on a node by as much as is kept for the system, and memory that a kernel counts by less.
    old = {"a": {**node(memory=32768), "memory_used_mib": 3000}}
    live = {"a": {**node(memory=32700), "memory_used_mib": 4900}}
    kept = room.steady(live, old)["a"]
    assert (kept["memory_mib"], kept["memory_used_mib"]) == (32768, 3000)
    live["a"]["memory_used_mib"] = 5500
    assert room.steady(live, old)["a"]["memory_used_mib"] == 5500


def test_the_same_facts_give_the_same_plan() -> None:
    models = {"big": {"replicas": 2}, "mid": {"slots": [4, 1]}, "low": {"keep": ["always", "on-demand"]}}
    nodes = {"a": node(gpu(0, 12288), gpu(1, 12288)), "b": node(gpu(0, 8192, "amd")), "c": node()}
    first = make(models, nodes, gib=6)
    assert make(models, nodes, gib=6, previous=first["instances"]) == first


def test_a_plan_that_was_made_from_the_same_facts_is_left_alone() -> None:
    registry, resolved = inputs({"chat": {}})
    nodes = {"a": node(gpu(0, 16384))}
    first = placement.plan(registry, resolved, nodes, [])
    # Even where a search would find another one now.
    known = {**first, "value": 1.0}
    same = placement.plan(registry, resolved, nodes, first["instances"], in_force=known)
    assert same["value"] == 1.0 and same["instances"] == first["instances"]
    silent = placement.plan(registry, resolved, nodes, [], unresolved={"chat": "the hub does not answer"})
    assert silent["inputs"] == first["inputs"], "the lock stands in for its files"
    other = {"a": node(gpu(0, 24576))}
    anew = placement.plan(registry, resolved, other, first["instances"], in_force=known)
    assert anew["value"] == first["value"] and anew["inputs"] != first["inputs"]


def test_when_plans_tie_the_node_that_has_the_file_wins() -> None:
    size = 4 * 2**30
    entry = {"library": "/m", "name": "chat.gguf", "path": "chat.gguf", "size": size, "sha256": None, "shards": []}
    nodes = {"a": node(gpu(0, 16384)), "b": node(gpu(0, 16384), library=[entry]), "c": node(gpu(0, 16384))}
    assert make({"chat": {"context": 8192}}, nodes)["instances"][0]["node"] == "b"
    # What the owner prefers comes before.
    assert make({"chat": {"context": 8192, "nodes": ["c", "b"]}}, nodes)["instances"][0]["node"] == "c"


def test_a_fallback_is_elsewhere_where_that_costs_nothing() -> None:
    nodes = {"a": node(gpu(0, 24576), gpu(1, 24576)), "b": node(gpu(0, 24576))}
    models = {"code": {"context": 8192, "fallbacks": ["chat"]}, "chat": {"context": 8192}}
    assert len({one["node"] for one in make(models, nodes)["instances"]}) == 2
    plan = make({"code": {**models["code"], "nodes": "b"}, "chat": {"context": 8192, "nodes": "a"}}, nodes)
    code = next(entry for entry in plan["survival"] if entry["lost"] == "b")
    assert code["loses"] == ["code"] and "chat answers for it" in code["sentence"]
    assert [entry["lost"] for entry in plan["survival"]] == ["a", "a gpu0", "a gpu1", "b"]


def test_all_servers_of_a_model_have_the_same_file() -> None:
    registry, resolved = inputs({"chat": {"context": 8192, "slots": 1, "kv": "f16", "replicas": 2}})
    large, little = (
        inputs({"chat": {}}, gib)[1]["chat"] | {"quant": name} for name, gib in (("Q8_0", 12), ("Q4_0", 6))
    )
    resolved["chat"] = {**large, "variants": [large, little]}
    nodes = {"a": node(gpu(0, 24576), memory=8192), "b": node(gpu(0, 10240), memory=8192)}
    plan = placement.plan(registry, resolved, nodes, [])
    assert [(one["variant"], one["quant"], one["fit"]) for one in plan["instances"]] == [(1, "Q4_0", "one_gpu")] * 2


def test_recovery_refuses_nothing_and_says_what_waits_for_what() -> None:
    words = {"context": 8192, "slots": 1, "kv": "f16"}
    models = {"high": {**words, "priority": 90}, "low": {**words, "priority": 10}, "mid": words}
    nodes = {"a": node(gpu(0, 12288), memory=4096), "b": node(gpu(0, 12288), gpu(1, 12288), memory=4096)}
    registry, resolved = inputs(models, 8)
    first = placement.plan(registry, resolved, nodes, [])
    assert len(first["instances"]) == 3 and first["waiting"] == []
    without = placement.plan(registry, resolved, {"a": nodes["a"]}, first["instances"], recovery=True)
    assert [one["model"] for one in without["instances"]] == ["high"] and without["refused"] == []
    waiting = {entry["model"]: entry for entry in without["waiting"]}
    assert set(waiting) == {"mid", "low"} and all("waits" in entry["sentence"] for entry in waiting.values())
    assert "b" in {entry["for"] for entry in waiting.values()}


def test_an_old_server_stops_first_where_old_and_new_do_not_fit_side_by_side() -> None:
    words = {"context": 8192, "slots": 1, "kv": "f16"}
    nodes = {"a": node(gpu(0, 12288))}
    first = make({"old": words}, nodes, gib=8)["instances"]
    registry, resolved = inputs({"new": {**words, "priority": 90}, "old": {**words, "priority": 10}}, 8)
    plan = placement.plan(registry, resolved, nodes, first)
    new = next(one for one in plan["instances"] if one["name"] == "new")
    assert new["devices"] == ["gpu0"] and new["stop_first"] == ["old"] and plan["order"]["a"][0] == "new"


def test_the_owners_order_of_steps() -> None:
    """Quant goes first, then context, KV type and slots; leaving the GPU is last."""
    worth = [
        quality.quality(0, 0, 0, 0, "one_gpu"),
        quality.quality(0, 0, 0, 0, "split"),
        quality.quality(1, 0, 0, 0, "one_gpu"),
        quality.quality(5, 0, 0, 0, "one_gpu"),
        quality.quality(0, 1, 0, 0, "one_gpu"),
        quality.quality(5, 5, 0, 0, "one_gpu"),
        quality.quality(0, 0, 1, 0, "one_gpu"),
        quality.quality(5, 5, 5, 0, "one_gpu"),
        quality.quality(0, 0, 0, 1, "one_gpu"),
        quality.quality(5, 5, 5, 5, "one_gpu"),
        quality.quality(0, 0, 0, 0, "experts_on_cpu", 0.125),
        quality.quality(0, 0, 0, 0, "layers_on_cpu", 0.125),
        quality.quality(0, 0, 0, 0, "cpu"),
        quality.quality(0, 0, 0, 0, "one_gpu", turns="accepted"),
    ]
    assert worth == sorted(set(worth), reverse=True)
    assert quality.step("quant", 9) < quality.step("quant", 8) < quality.STEPS["quant"][-1]


def test_what_was_learned_of_a_card_takes_the_place_of_the_constant() -> None:
    model = {"chat": {"context": 8192, "slots": 1, "kv": "f16"}}
    plain, learned = node(gpu(0, 8192)), {**node(gpu(0, 8192)), "overheads": {"gpu0": 1000}}
    before = make(model, {"a": plain}, gib=4)["instances"][0]
    after = make(model, {"a": learned}, gib=4)["instances"][0]
    (constant,) = [part for part in before["parts"] if part["kind"] == "overhead"]
    (part,) = [part for part in after["parts"] if part["kind"] == "overhead"]
    assert (constant["source"], part["source"], part["bytes"]) == ("bound", "measured", 1000 * 2**20)
    assert after["memory"]["gpu0"] - before["memory"]["gpu0"] == 1000 - constant["bytes"] // 2**20
    # Where it does not fit any more, it is not placed there.
    full = {**node(gpu(0, 8192)), "overheads": {"gpu0": 4000}}
    assert make(model, {"a": full}, gib=4)["instances"][0]["fit"] != "one_gpu"
