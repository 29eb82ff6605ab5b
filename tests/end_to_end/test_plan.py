# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan and what really happens: what was planned is what servers take, and what has no place keeps nobody waiting.

Needs the box (./lab up), and leaves the lab as it was found.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_answers import BOX, LAB, chat, on, secrets
from test_changes import changed, good, playbook, started

from tests.sample import long

MEASURED = BOX / "lab.measured.json"
__all__ = ["secrets"]  # a fixture


@pytest.fixture
def models() -> Iterator[dict[str, Any]]:
    """Return the box's registry, its paths filled in; in the end the box has its own again."""
    found = copy.deepcopy(LAB["lab_models"])
    for model in found.values():
        if "file" in model["source"]:
            model["source"]["file"] = str(BOX / "models" / Path(model["source"]["file"]).name)
    yield found
    good(playbook("plan"))
    good(playbook("site"))


def test_what_servers_took_is_what_was_planned() -> None:
    good(playbook("plan"))
    MEASURED.unlink(missing_ok=True)
    output = good(playbook("site"))
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert found, "every server of the box is asked"
    for name, entry in found.items():
        assert entry["planned"], name
        for where, size in entry["planned"].items():
            assert entry["took"][where] == pytest.approx(size, rel=0.02, abs=8), (name, where)
    assert " MiB were planned." not in output


@long
def test_what_has_no_place_is_refused_by_name_and_the_rest_is_deployed(models: dict[str, Any]) -> None:
    # One request of 200 million tokens, which no machine has the memory for.
    models["giant"] = {**models["code"], "context": 200_000_000, "categories": [], "args": {}}
    before = {node: started(node) for node in ("helium", "lithium")}
    plan = playbook("plan", models=models)
    assert plan.returncode == 2
    assert "giant not planned" in plan.stdout

    strict = playbook("site", "-e", "lab_strict=true", models=models)
    assert strict.returncode == 2
    assert "nothing was touched" in strict.stdout and "giant: " in strict.stdout
    assert {node: started(node) for node in before} == before

    models["code"]["context"] = 1024
    assert playbook("plan", models=models).returncode == 2
    rest = playbook("site", models=models)
    assert rest.returncode == 2
    assert "giant not deployed: it needs " in rest.stdout
    after = {node: started(node) for node in before}
    moved = {name for node in before for name in before[node] if before[node][name] != after[node].get(name)}
    assert moved == {"llamacpp-code"}, "its neighbours stay, the change beside the refusal is made"


@long
def test_models_that_do_not_fit_beside_each_other_take_turns(models: dict[str, Any], secrets: dict[str, str]) -> None:
    # Each takes more than half of the card for its context; its batch is small, or the mask would take the rest.
    large = {"nodes": ["lithium"], "keep": "on-demand", "context": 500_000, "kv": "f16", "args": {"ubatch-size": 32}}
    for name in ("day", "night"):
        models[name] = {"source": {"library": "chat.gguf"}, **large}
    good(playbook("plan", models=models))
    lock = yaml.safe_load((BOX / "lab.lock.yml").read_text(encoding="utf-8"))
    planned = {one["model"]: one for one in lock["instances"] if one["model"] in ("day", "night")}
    assert {name: (one["fit"], one["devices"]) for name, one in planned.items()} == {
        "day": ("turns", ["gpu0"]),
        "night": ("turns", ["gpu0"]),
    }
    before = started("lithium")
    good(playbook("site", models=models))
    after = started("lithium")
    assert set(after) - set(before) == {"llamacpp-day"}, "one server for both"
    assert {name: after[name] for name in before} == before

    # Asked in turn, and both at once, both answer; each time the layers are on the card.
    with ThreadPoolExecutor() as pool:
        for wanted in (["day"], ["night"], ["day"], ["night", "day", "night", "day"]):
            for name, (status, answer, headers) in zip(wanted, pool.map(lambda name: chat(secrets, name), wanted)):
                assert status == 200, answer
                assert answer["model"] == name
                assert headers.get("x-litellm-model-id") == name
    log = on("lithium", "docker logs llamacpp-day 2>&1")
    assert log.count("offloaded 3/3 layers to GPU") >= 4
    # Asking how they are wakes nobody, and a second run changes nothing.
    awake = log.count("spawning server instance")
    assert "/models: " in good(playbook("health", models=models))
    assert not changed(good(playbook("site", models=models)))
    assert on("lithium", "docker logs llamacpp-day 2>&1").count("spawning server instance") == awake
    assert started("lithium") == after
