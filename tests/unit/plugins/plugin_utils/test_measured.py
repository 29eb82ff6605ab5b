# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What servers took is kept, held against the plan, and never made up."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils import measured

MIB = 2**20


def lock(**sizes: int) -> dict[str, Any]:
    parts = [{"where": "gpu0", "kind": kind, "bytes": mib * MIB, "source": "computed"} for kind, mib in sizes.items()]
    instance = {"name": "chat", "model": "chat", "node": "forge", "devices": ["gpu0"], "parts": parts}
    models = {"chat": {"shape": {"architecture": "llama"}}}
    return {"instances": [{**instance, "server_options": {"ctx-size": 1}}], "models": models}


def answer(**sizes: float) -> dict[str, Any]:
    server = {"image_id": "sha256:1", "started_at": "2026-01-01T00:00:00Z", "memory": {"gpu0": sizes}}
    return {"forge": {"servers": {"llamacpp-chat": server}, "problems": []}}


def test_only_what_a_log_tells_of_is_compared() -> None:
    found, sentences = measured.merge({}, lock(weights=1000, overhead=456), answer(model=1001.0))
    assert found["chat"]["planned"] == {"gpu0": 1000.0} and found["chat"]["took"] == {"gpu0": 1001.0}
    assert sentences == []


def test_more_than_two_per_cent_is_said_with_the_names_and_numbers() -> None:
    _found, sentences = measured.merge({}, lock(weights=1000, kv=100), answer(model=1001.0, kv=140.0))
    assert sentences == ["chat took 1141 MiB of gpu0 of forge, 1100 MiB were planned."]
    _found, sentences = measured.merge({}, lock(weights=10, kv=1), answer(model=10.0, kv=5.0))
    assert sentences == [], "some MiB of a small server are no news"


def test_a_server_whose_log_was_rotated_keeps_what_is_known() -> None:
    before, _sentences = measured.merge({}, lock(weights=1000), answer(model=1001.0))
    silent = {"forge": {"servers": {}, "problems": [{"name": "llamacpp-chat", "error": "no start in the log"}]}}
    assert measured.merge(before, lock(weights=1000), silent) == (before, [])
    assert measured.merge({}, lock(weights=1000), silent) == ({}, ["no start in the log"])
    assert measured.merge(before, lock(weights=1000), {}) == (before, []), "a node that was away"


def test_what_left_the_lock_leaves_the_file() -> None:
    before, _sentences = measured.merge({}, lock(weights=1000), answer(model=1001.0))
    assert measured.merge(before, {"instances": []}, {}) == ({}, [])


def test_a_broken_file_is_as_good_as_none() -> None:
    assert measured.parse("{half") == {} and measured.parse("[]") == {} and measured.parse('{"a": 1}') == {"a": 1}


def test_what_a_driver_takes_for_itself_is_learned_per_card() -> None:
    seen = answer(model=1001.0, compute=99.0)
    seen["forge"]["servers"]["llamacpp-chat"]["process"] = {"gpu0": 1561}
    found, sentences = measured.merge({}, lock(weights=1000, compute=100, overhead=456), seen)
    assert sentences == []
    # 461 MiB, rounded up, so that the next start changes no plan.
    assert measured.overheads(found) == {"forge": {"gpu0": 464}}
    more = {**found, "code": {**found["chat"], "process": {"gpu0": 1573, "gpu1": 300}, "took": {"gpu0": 1100.0}}}
    assert measured.overheads(more) == {"forge": {"gpu0": 480, "gpu1": 304}}
    # Nothing is learned from cards of which nobody says it, nor from nonsense.
    unsaid, _sentences = measured.merge({}, lock(weights=1000), answer(model=1001.0))
    assert measured.overheads(unsaid) == {} and measured.overheads({"a": 1, "b": {}}) == {}
    assert measured.overheads({"a": {**found["chat"], "process": {"gpu0": 900}}}) == {}
