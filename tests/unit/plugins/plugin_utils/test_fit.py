# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Would it fit? The answers agree with the planner; labs that do not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import placement
from ansible_collections.homelab.inference.plugins.plugin_utils import fit, lab, what_if

from tests.models import synthetic

Q7, Q32 = "qwen2.5-7b", "qwen2.5-32b"


def node(memory: int, *cards: int, **more: Any) -> dict[str, Any]:
    devices = [
        {
            "id": f"gpu{number}",
            "vendor": "nvidia",
            "name": f"card {number}",
            "memory_mib": size,
            "memory_kind": "dedicated",
            "architecture": "sm_86",
            "cap_mib": None,
        }
        for number, size in enumerate(cards)
    ]
    kept = {"devices": devices, "memory_mib": memory, "cpus": 8, "runtime": "docker", "presence": "always"}
    return {**kept, "library": [], "ports": [], "reservations": {}, **more}


def found(model: str, name: str, quant: str) -> dict[str, Any]:
    """Return what module model_source_info says of one file."""
    file = {
        "name": f"{name}-{quant}.gguf",
        "size": synthetic.header(name, quant)[1],
        "sha256": None,
        "url": "https://x",
    }
    shape = synthetic.shape(name, quant)
    return {"model": model, "commit": "c", "quant": quant, "files": [file], "mmproj": None, "shape": shape}


def world(**nodes: dict[str, Any]) -> dict[str, Any]:
    """Return a lab of one model, as action lab returns it before the first plan."""
    nodes = nodes or {"small": node(16384, 8192), "large": node(65536, 24576)}
    first = next(iter(nodes))
    medium = {"source": {"hf": "b/Q7-GGUF", "quant": ["Q4_K_M"]}, "context": [8192], "slots": 1, "nodes": first}
    return {
        "models": {"medium": lab.normal_model("medium", medium)},
        "nodes": nodes,
        "lock": None,
        "libraries": {},
        "inventory_dir": "/nowhere",
        "declaration": {"groups": {"inference": list(nodes)}},
    }


SOURCES = [
    found("medium", Q7, "Q4_K_M"),
    *(found("Q32", Q32, quant) for quant in ("Q8_0", "Q4_K_M", "Q2_K")),
]


def ask(lab_now: dict[str, Any], **words: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    asked = fit.question(lab_now, words)
    assert asked["problems"] == []
    return asked, fit.answer(lab_now, asked, SOURCES, [])


def rows(answered: dict[str, Any], quant: str, host: str) -> dict[str, fit.Row]:
    return {row.answer: row for row in answered["rows"] if (row.quant, row.node) == (quant, host)}


def test_each_file_is_answered_on_each_node() -> None:
    asked, answered = ask(world(), model="b/Q32-GGUF", slots=1)
    assert {(row.quant, row.node) for row in answered["rows"]} == {
        (quant, host) for quant in ("Q8_0", "Q4_K_M", "Q2_K") for host in ("small", "large")
    }
    (row,) = rows(answered, "Q8_0", "small").values()
    assert row.answer == "no" and row.short > 1000
    text = fit.table(asked, answered, 100)
    assert max(map(len, text.splitlines())) <= 100
    never = [row for row in answered["rows"] if (row.node, row.answer) == ("small", "no")]
    close = min(never, key=lambda row: row.short)
    assert f"{close.quant} lacks {close.short} MiB in " in " ".join(text.split())
    assert "Q32 fits beside what runs: Q4_K_M on large gpu0 with" in text


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_what_is_said_to_fit_is_planned_there_and_nothing_longer(quant: str) -> None:
    """The planner itself, with what runs taken off as a reservation, says the same."""
    lab_now = world()
    asked, answered = ask(lab_now, model="b/Q32-GGUF", slots=1)
    row = rows(answered, quant, "large")["beside"]
    beside = {
        where: sum(one["memory"].get(where, 0) for one in answered["plan"]["instances"] if one["node"] == "large")
        for where in ("gpu0", "host")
    }
    nodes = {"large": {**lab_now["nodes"]["large"], "reservations": beside}}
    resolved = {"Q32": next(one for one in SOURCES if one["model"] == "Q32" and one["quant"] == quant)}

    def planned(context: int) -> list[tuple[Any, ...]]:
        model = {**asked["models"]["Q32"], "context": [context], "kv": [row.choice.step.kv]}
        plan = placement.plan({"Q32": model}, resolved, nodes, [])
        return [(one["devices"], one["fit"]) for one in plan["instances"]]

    place = (list(row.choice.place.devices), row.choice.place.fit)
    assert planned(row.choice.step.context) == [place]
    assert row.longest >= row.choice.step.context
    if place[1] == "one_gpu":
        assert planned(row.longest) == [place]
        trained = resolved["Q32"]["shape"]["context_length"]
        assert row.longest == trained or planned(row.longest + 2 * fit.GRAIN) != [place]


def test_what_has_to_make_way_is_named_with_what_becomes_of_it() -> None:
    lab_now = world(one=node(65536, 24576), other=node(16384, 8192))
    lab_now["models"]["medium"]["nodes"] = ["one", "other"]
    lab_now["lock"] = {
        "declared": {"models": {"medium": {"source": lab_now["models"]["medium"]["source"]}}},
        "models": {"medium": SOURCES[0]},
        "nodes": lab_now["nodes"],
        "refused": [],
        "instances": [
            {
                **placement.plan(lab_now["models"], {"medium": SOURCES[0]}, {"one": lab_now["nodes"]["one"]}, [])[
                    "instances"
                ][0]
            }
        ],
    }
    asked, answered = ask(lab_now, model="b/Q32-GGUF", quant="Q4_K_M", slots=1)
    assert asked["sources"] == [{"model": "Q32", "source": {"hf": "b/Q32-GGUF", "quant": ["Q4_K_M"]}}]
    row = rows(answered, "Q4_K_M", "one")["instead"]
    assert [one["name"] for one in row.gone] == ["medium"]
    assert row.goes == ("medium (which then runs on other gpu0, 8192 tokens)",)
    text = fit.table(asked, answered, 100)
    assert "Q4_K_M on one gpu0: instead of medium (which then runs on other gpu0, 8192 tokens)." in " ".join(
        text.split()
    )
    del lab_now["nodes"]["other"]
    lab_now["models"]["medium"]["context"] = [32768]
    lab_now["nodes"]["one"]["memory_mib"] = 6144
    _asked, answered = ask(lab_now, model="b/Q32-GGUF", quant="Q4_K_M", slots=1)
    row = rows(answered, "Q4_K_M", "one")["instead"]
    assert row.goes == ("medium (which then has no place)",)


def test_a_model_of_the_lab_makes_way_for_itself() -> None:
    lab_now = world(one=node(65536, 8192))
    _asked, answered = ask(lab_now, model="medium", quant="Q4_K_M")
    (row,) = answered["rows"]
    assert (row.answer, row.choice.place.devices, row.fetch) == ("beside", ("gpu0",), 0)


def test_files_that_lie_on_a_node_are_not_fetched() -> None:
    file = next(one for one in SOURCES if one["model"] == "Q32")["files"][0]
    entry = {"library": "/srv/models", "path": file["name"], "shards": [], **file}
    lab_now = world(one=node(65536, 24576, library=[entry]), two=node(65536, 24576))
    _asked, answered = ask(lab_now, model="b/Q32-GGUF")
    fetched = {row.node: row.fetch for row in answered["rows"] if row.quant == "Q8_0"}
    assert fetched == {"one": 0, "two": file["size"]}


def test_a_lab_without_a_node_and_with_a_card() -> None:
    lab_now = world(small=node(8192, 4096), large=node(65536, 24576))
    lab_now["models"]["medium"]["nodes"] = None
    asked, answered = ask(lab_now, without="large")
    assert asked["changes"] == ["without large"] and asked["name"] is None
    text = fit.table(asked, answered, 100)
    assert text.startswith("THE LAB without large\n")
    assert "  medium moves from large gpu0 to small gpu0+cpu as medium-2, with " in text
    asked, answered = ask(lab_now, model="b/Q32-GGUF", quant="Q8_0", plus="small:48GiB")
    (row,) = rows(answered, "Q8_0", "small").values()
    assert (row.answer, row.choice.place.devices) == ("beside", ("gpu1",))
    assert "with a card of 48GiB as gpu1 of small" in fit.table(asked, answered, 80)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "Nothing is asked."),
        ({"model": "mediun"}, "did you mean medium?"),
        ({"model": "/no/such/file.gguf"}, "is no model of lab_models"),
        ({"model": "b/Q32-GGUF", "context": "long"}, "context is 'long'; write a number"),
        ({"model": "https://example.org/a.gguf", "quant": "Q8_0"}, "is one file; leave it out"),
        ({"without": "larg"}, "without names 'larg', which is no inference node; did you mean large?"),
        ({"without": "large:gpu7"}, "without names gpu7 of large, which has gpu0."),
        ({"plus": "large"}, "plus does not say a node and a size such as 32GiB."),
        ({"plus": {"node": "large", "memory": "many"}}, "plus does not say a node and a size"),
        ({"plus": '{"node":'}, "which breaks off"),
        ({"plus": {"node": "large", "memory": "8GiB", "colour": "red"}}, "plus has no key colour"),
        ({"plus": {"node": "large", "memory": "8GiB", "vendor": "acme"}}, "plus has vendor 'acme'; known are nvidia"),
        ({"plus": "huge:32GiB"}, "for a new machine say its main memory too"),
        ({"without": "small,large"}, "No hardware is known"),
    ],
)
def test_what_cannot_be_understood_is_said_with_what_to_write(words: dict[str, Any], told: str) -> None:
    assert told in " ".join(fit.question(world(), words)["problems"])


def test_every_spelling_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").touch()
    lab_now = world()
    lab_now["libraries"] = {"large": [{"name": "lies.gguf", "path": "sub/lies.gguf"}]}

    def source(word: str) -> dict[str, Any]:
        asked = fit.question(lab_now, {"model": word, "directory": str(tmp_path)})
        assert asked["problems"] == []
        return asked["models"][asked["name"]]["source"]

    assert source("owner/Some-8B-GGUF") == {"hf": "owner/Some-8B-GGUF", "quant": list(fit.QUANTS)}
    assert source("owner/Some-8B-GGUF:Q6_K") == {"hf": "owner/Some-8B-GGUF", "quant": ["Q6_K"]}
    assert source("https://huggingface.co/owner/Some-GGUF")["hf"] == "owner/Some-GGUF"
    assert source("https://huggingface.co/owner/Some-GGUF/blob/main/sub/a-Q4_0.gguf?download=true") == {
        "hf": "owner/Some-GGUF",
        "revision": "main",
        "file": "sub/a-Q4_0.gguf",
    }
    assert source("https://example.org/x/a.gguf") == {"url": "https://example.org/x/a.gguf"}
    assert source("mine.gguf") == {"file": str(tmp_path / "mine.gguf")}
    assert source("lies.gguf") == {"library": "lies.gguf"}
    # The owner's quantisations come first.
    assert source("medium")["quant"][:2] == ["Q4_K_M", "BF16"]


def test_plus_takes_every_spelling() -> None:
    for plus in (
        "large:32GiB",
        {"node": "large", "memory": "32GiB"},
        "{node: large, memory: 32GiB}",
        [{"node": "large", "memory": "32GiB"}],
    ):
        nodes, _changes, problems = what_if.change({"large": node(1024, 8192)}, ["large"], None, plus)
        assert problems == []
        assert [device["memory_mib"] for device in nodes["large"]["devices"]] == [8192, 32768]
    new = {"node": "new", "memory": "96GiB", "main_memory": "128GiB", "vendor": "apple", "unified": True}
    nodes, changes, problems = what_if.change({}, [], None, new)
    assert problems == [] and changes == ["with a card of 96GiB as gpu0 of new, a new machine"]
    assert nodes["new"]["memory_mib"] == 131072 and nodes["new"]["devices"][0]["memory_kind"] == "unified"
