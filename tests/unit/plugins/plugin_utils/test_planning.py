# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From declared sources to the files that a plan chooses from."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.memory.calibration import fingerprint
from ansible_collections.homelab.inference.plugins.plugin_utils import lab, planning, views


def registry(**source: Any) -> dict[str, Any]:
    return {"chat": lab.normal_model("chat", {"source": source})}


def answer(quant: str) -> dict[str, Any]:
    file = {"name": f"chat-{quant}.gguf", "size": 1, "sha256": None, "url": f"http://hub.example/{quant}"}
    return {"model": "chat", "quant": quant, "files": [file], "commit": "c", "shape": {"quant": quant}}


def test_every_allowed_quantisation_is_asked_for_by_itself() -> None:
    models = registry(hf="owner/name", quant=["Q6_K", "Q4_K_M"], mmproj="auto")
    assert planning.sources(models, "/lab") == [
        {"model": "chat", "source": {"hf": "owner/name", "quant": [quant], "mmproj": "auto"}}
        for quant in ("Q6_K", "Q4_K_M")
    ]
    assert planning.sources(registry(hf="owner/name", quant="Q8_0"), "/lab")[0]["source"]["quant"] == ["Q8_0"]
    assert planning.sources(registry(hf="owner/name"), "/lab") == [{"model": "chat", "source": {"hf": "owner/name"}}]


def test_those_that_the_source_has_become_variants_in_the_owners_order() -> None:
    models = registry(hf="owner/name", quant=["Q6_K", "Q5_K_M", "Q4_K_M"])
    found = planning.resolve(models, [answer("Q6_K"), answer("Q4_K_M")], {}, None)["chat"]
    assert [variant["quant"] for variant in found["variants"]] == ["Q6_K", "Q4_K_M"]
    assert found["files"] == found["variants"][0]["files"]
    assert "variants" not in planning.resolve(models, [answer("Q4_K_M")], {}, None)["chat"]


def test_a_server_gets_the_files_of_the_variant_that_the_plan_chose() -> None:
    models = registry(hf="owner/name", quant=["Q6_K", "Q4_K_M"])
    found = planning.resolve(models, [answer("Q6_K"), answer("Q4_K_M")], {}, None)
    lock = {"models": found}
    assert views.chosen({"model": "chat", "variant": 1}, lock)["files"][0]["name"] == "chat-Q4_K_M.gguf"


def test_a_projector_and_a_draft_model_are_known_to_the_plan() -> None:
    models = registry(hf="owner/name", mmproj="auto")
    seen = {**answer("Q4_K_M"), "mmproj": {"name": "mmproj.gguf", "size": 2, "shape": {"architecture": "clip"}}}
    found = planning.resolve(models, [seen], {}, None)["chat"]
    assert found["projector"] == {"architecture": "clip"} and found["files"][-1]["name"] == "mmproj.gguf"

    models["chat"]["args"] = {"model-draft": "/models/small.gguf"}
    small = {"library": "/srv", "name": "small.gguf", "path": "small.gguf", "size": 1, "sha256": None, "shards": []}
    index = {"forge": [{**small, "commit": None, "shape": {"quant": "Q8_0"}}]}
    assert planning.resolve(models, [seen], index, None)["chat"]["draft"] == {"quant": "Q8_0"}
    assert planning.resolve(models, [seen], {}, None) == {}
    assert "draft model small.gguf lies in no node_library" in planning.unresolved(models, [], {})["chat"]


def test_of_a_known_architecture_a_start_teaches_nothing() -> None:
    """What is computed is exact; a plan shall not change because servers run."""
    shape = {"architecture": "llama", "quant": "Q4_K_M", "block_count": 1}
    seen = {"model": "chat", "devices": [], "shape": fingerprint(shape), "server_options": {"ctx-size": 512}}
    seen |= {"image_id": "sha256:1", "memory": {"host": {"compute": 5}}}
    files = {**answer("Q4_K_M"), "shape": shape}
    models = registry(hf="owner/name")
    without = planning.resolve(models, [files], {}, None)
    assert planning.resolve(models, [files], {}, None, {"chat": seen}) == without
    # A file of an earlier version, one of somebody else or none at all is no reason to fail.
    for other in ({}, {"chat": {"node": "forge", "took": {}}}, {"a": 1}, None):
        assert planning.resolve(models, [files], {}, None, other) == without
    strange = {**files, "shape": {**shape, "architecture": "of-tomorrow"}}
    seen["shape"] = fingerprint(strange["shape"])
    found = planning.resolve(models, [strange], {}, None, {"chat": seen})["chat"]
    assert found["calibration"]["points"][0]["buffers"] == {"host": {"compute": 5 * 2**20}}
