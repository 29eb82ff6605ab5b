# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The schema reader agrees with the jsonschema library on good and on damaged declarations."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import yaml
from ansible_collections.homelab.inference.plugins.plugin_utils.schema import Checker, load
from hypothesis import given, settings
from hypothesis import strategies as st

SCHEMA = load("schema.yml")
ORACLE = jsonschema.Draft202012Validator(SCHEMA)
FULL = yaml.safe_load("""
lab_domain: lab.example.net
lab_networks:
  servers: {cidr: 10.0.10.0/24, vlan: 10}
  home: {cidr: 10.0.20.0/24, reaches: {servers: [https, 8443/tcp]}}
lab_firewall: observe
lab_models:
  coder:
    source: {hf: acme/coder-GGUF, quant: [Q6_K, Q4_K_M], mmproj: auto}
    context: [65536, 32768]
    kv: f16
    slots: [4, 2]
    priority: 90
  big:
    source: {library: big.gguf}
    nodes: [a, b]
    replicas: each
    keep: on-demand
    args: {top-k: 40, jinja: true, x: [1, 2]}
    port: 9000
lab_reservations: {a: [{device: gpu1, memory: 8GiB, for: comfyui}]}
lab_services: {litellm: {node: a, ports: {http: 4001}}, pihole: {external: 10.0.10.2}}
lab_tiers: {REMOTE: {timeout: 8.5}}
lab_alerts: {discord: true}
lab_registry_mirror: http://10.0.0.1:5000
node_library: [/srv/models]
node_wake: {method: wol, mac: "a8:a1:59:00:11:22"}
node_gpus:
  - id: gpu0
    vendor: nvidia
    name: RTX
    uuid: null
    pci: "0000:01:00.0"
    memory_mib: 16384
    memory_kind: dedicated
    cap_mib: null
""")


def found(value: Any) -> list[str]:
    """Return what our reader says."""
    return list(Checker(SCHEMA).check(value, SCHEMA, ""))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def test_the_schema_is_a_json_schema_and_every_key_says_what_it_is_for() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    model = SCHEMA["$defs"]["model"]["properties"]
    for name, entry in {**SCHEMA["properties"], **model}.items():
        entry = Checker(SCHEMA).resolve(entry)
        assert "description" in entry, name
        assert "x-default" in entry or name in SCHEMA["$defs"]["model"]["required"], name


def test_a_full_declaration_is_good() -> None:
    assert found(FULL) == []
    assert ORACLE.is_valid(FULL)


@settings(max_examples=150, deadline=None)
@given(
    place=st.sampled_from([place for place in places(FULL) if place]),
    junk=st.sampled_from(
        [None, True, -1, 0, 3.5, 10**9, "", "x y", "Q4_K_M", "each", [], ["a", 1], {}, {"unknown": 1}, [[]]]
    ),
    rename=st.booleans(),
)
def test_damage_is_found_exactly_where_the_library_finds_it(place: tuple[Any, ...], junk: Any, rename: bool) -> None:
    damaged = copy.deepcopy(FULL)
    target = damaged
    for step in place[:-1]:
        target = target[step]
    if rename and isinstance(place[-1], str):
        target[place[-1] + "x"] = target.pop(place[-1])
    else:
        target[place[-1]] = junk
    assert bool(found(damaged)) == (not ORACLE.is_valid(damaged))
