# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The declaration: what is refused, in which words, and what is derived."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from ansible_collections.homelab.inference.plugins.plugin_utils import lab

GOOD = yaml.safe_load("""
nodes:
  nuc: {ansible_host: 192.0.2.5}
  forge: {ansible_host: 192.0.2.20}
  rig: {ansible_host: 192.0.2.50, node_presence: guest}
groups: {control: [nuc], inference: [forge, rig], library: []}
secrets: {}
problems: []
lab:
  lab_models:
    big: {source: {hf: acme/big-GGUF, quant: [Q6_K, Q4_K_M]}, categories: [chat], priority: 90}
    small: {source: {file: /srv/small.gguf}, categories: [chat, fast]}
    vectors: {source: {library: vectors.gguf}, categories: [embed], replicas: each}
  lab_services:
    litellm: {node: nuc}
    pihole: {external: 192.0.2.2}
""")


def problems(**changes: Any) -> list[str]:
    """Return what validation says to the good lab with changed lab_* variables."""
    declaration = copy.deepcopy(GOOD)
    declaration["lab"].update(changes)
    return lab.validate(declaration)[0]


def model(**changes: Any) -> dict[str, Any]:
    """Return the registry with one more model."""
    return {**GOOD["lab"]["lab_models"], "extra": {"source": {"file": "/x.gguf"}, **changes}}


def test_a_good_lab_has_no_problem() -> None:
    assert lab.validate(copy.deepcopy(GOOD))[0] == []


@pytest.mark.parametrize(
    ("wake", "sentence"),
    [
        ({"method": "wol"}, "rig: node_wake.mac is missing"),
        ({"method": "wol", "mac": "a8:a1:59:00:11:22"}, ""),
        ({"method": "plug", "address": "192.0.2.9"}, "rig: node_wake.address is no URL"),
        ({"method": "plug", "address": "http://192.0.2.9/relay/0?turn=on"}, ""),
    ],
)
def test_who_is_woken_can_be(wake: dict[str, str], sentence: str) -> None:
    declaration = copy.deepcopy(GOOD)
    declaration["nodes"]["rig"]["node_wake"] = wake
    found = lab.validate(declaration)[0]
    assert found == [] if not sentence else sentence in found[0]


def test_who_repairs_the_lab_is_the_only_one_that_is_reached_locally() -> None:
    declaration = copy.deepcopy(GOOD)
    declaration["lab"]["lab_services"] |= {"prometheus": {"node": "nuc"}, "alertmanager": {"node": "nuc"}}
    declaration["nodes"]["nuc"]["ansible_connection"] = "local"
    assert lab.validate(declaration)[0] == []
    declaration["nodes"]["forge"]["ansible_connection"] = "local"
    (problem,) = lab.validate(declaration)[0]
    assert problem.startswith("forge has ansible_connection local, and nuc is to repair the lab")


def test_who_watches_and_who_is_watched_are_on_one_node_or_somebody_says_what_that_costs() -> None:
    def warnings(**homes: str) -> str:
        declaration = copy.deepcopy(GOOD)
        declaration["lab"]["lab_services"] |= {name: {"node": home} for name, home in homes.items()}
        return " ".join(lab.validate(declaration)[1])

    assert "is not on the node of" not in warnings(prometheus="nuc", alertmanager="nuc")
    assert "alertmanager is not on the node of prometheus" in warnings(prometheus="nuc", alertmanager="forge")
    assert "prometheus is not on the node of litellm" in warnings(prometheus="forge", alertmanager="forge")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lab_model": {}}, "lab_model is not a known key; did you mean lab_models?"),
        ({"lab_models": model(contxt=3)}, "lab_models.extra.contxt is not a known key; did you mean context?"),
        ({"lab_models": model(slots="two")}, "lab_models.extra.slots is 'two', but has to be a whole number."),
        ({"lab_models": model(context=[])}, "lab_models.extra.context is an empty list"),
        (
            {"lab_models": model(categories=["cod"])},
            "lab_models.extra.categories[0] is 'cod', but has to be one of code",
        ),
        (
            {"lab_models": model(nodes="forg")},
            "lab_models.extra.nodes names 'forg', which is no host of the inventory; did you mean forge?",
        ),
        ({"lab_models": model(nodes="nuc")}, "lab_models.extra.nodes names nuc, which is not in the group inference"),
        ({"lab_models": model(nodes="rig")}, "lab_models.extra would live on guests alone (rig)"),
        ({"lab_models": model(replicas=3)}, "lab_models.extra.replicas is 3, but only 2 nodes may run it"),
        (
            {"lab_models": model(fallbacks=["smal"])},
            "lab_models.extra.fallbacks names 'smal', which is no model of lab_models; did you mean small?",
        ),
        ({"lab_models": model(fallbacks=["vectors"])}, "one of the two is an embedding model"),
        ({"lab_models": model(fallbacks=["extra"])}, "lab_models.extra.fallbacks goes in a circle (extra -> extra)"),
        (
            {"lab_models": model(source={"file": "/x", "url": "https://x/y"})},
            "lab_models.extra.source has to name exactly one of",
        ),
        (
            {"lab_models": model(source={"ollama": "qwen"})},
            "lab_models.extra.source.ollama does not go with engine llamacpp",
        ),
        (
            {"lab_models": model(source={"file": "/x", "quant": "Q4_0"})},
            "lab_models.extra.source.quant chooses among the files of a repository",
        ),
        (
            {"lab_models": model(args={"ctx-size": 4})},
            "lab_models.extra.args.ctx-size is set by the plan; leave it out (the model's key context).",
        ),
        ({"lab_models": model(args={"no-mmproj": True})}, "lab_models.extra.args.no-mmproj is set by the plan"),
        ({"lab_models": model(args={"--top-k": 4})}, "lab_models.extra.args.--top-k has dashes; write 'top-k'."),
        (
            {
                "lab_models": {
                    "code": {"source": {"file": "/x"}},
                    "b": {"source": {"file": "/y"}, "categories": ["code"]},
                }
            },
            "has the name of the category",
        ),
        (
            {"lab_services": {"grafna": {"node": "nuc"}}},
            "lab_services.grafna is not a known service; did you mean grafana?",
        ),
        ({"lab_services": {"grafana": {}}}, "lab_services.grafana has to say either node"),
        (
            {"lab_services": {"grafana": {"node": "nug"}}},
            "lab_services.grafana.node is 'nug', which is no host of the inventory; did you mean nuc?",
        ),
        (
            {"lab_services": {"grafana": {"node": "nuc", "ports": {"htp": 1}}}},
            "lab_services.grafana.ports.htp is not a port of grafana; did you mean http?",
        ),
        (
            {"lab_services": {"cloudflare": {"node": "nuc"}}},
            "lab_secret_cloudflare_token is missing or empty, and lab_services.cloudflare needs it",
        ),
        (
            {"lab_alerts": {"discord": True}},
            "lab_secret_discord_webhook is missing or empty, and lab_alerts.discord needs it",
        ),
        (
            {"lab_reservations": {"forg": []}},
            "lab_reservations.forg is for no host of the inventory; did you mean forge?",
        ),
        ({"lab_networks": {"a": {"cidr": "10.0.0.1/24"}}}, "write the network's own address"),
        (
            {"lab_networks": {"a": {"cidr": "10.0.0.0/8"}, "b": {"cidr": "10.1.0.0/16"}}},
            "lab_networks.a and lab_networks.b overlap",
        ),
        (
            {"lab_networks": {"a": {"cidr": "10.0.0.0/24", "reaches": {"b": ["http"]}}}},
            "lab_networks.a.reaches names 'b', which is no network",
        ),
    ],
)
def test_refusals_name_object_cause_and_cure(changes: dict[str, Any], sentence: str) -> None:
    found = problems(**changes)
    assert any(sentence in problem for problem in found), found
    assert not any("?." in problem for problem in found)


def test_all_problems_come_in_one_run() -> None:
    found = problems(
        lab_services={"grafana": {"node": "nug"}}, lab_models=model(nodes="forg"), lab_reservations={"x": []}
    )
    assert len(found) == 3


def test_clashing_ports_name_the_next_free_one() -> None:
    """Mission X5: the ports of the source document on one machine."""
    services = {name: {"node": "nuc"} for name in ("authentik", "minio", "portainer", "coolify")}
    found = problems(lab_services=services)
    assert found == [
        "lab_services.minio.ports.s3 and lab_services.authentik.ports.http both want port 9000 on nuc; "
        "set lab_services.minio.ports.s3 to 9002, the next free one.",
        "lab_services.portainer.ports.https and lab_services.authentik.ports.https both want port 9443 on nuc; "
        "set lab_services.portainer.ports.https to 9444, the next free one.",
        "lab_services.coolify.ports.http and lab_services.portainer.ports.edge both want port 8000 on nuc; "
        "set lab_services.coolify.ports.http to 8001, the next free one.",
    ]
    cured = {
        **services,
        "minio": {"node": "nuc", "ports": {"s3": 9002}},
        "portainer": {"node": "nuc", "ports": {"https": 9444}},
    }
    assert problems(lab_services={**cured, "coolify": {"node": "nuc", "ports": {"http": 8001}}}) == []


def test_after_the_highest_port_the_next_free_one_is_a_low_one() -> None:
    services = {
        "grafana": {"node": "nuc", "ports": {"http": 65535}},
        "litellm": {"node": "nuc", "ports": {"http": 65535}},
    }
    (problem,) = problems(lab_services=services)
    assert problem.endswith("set lab_services.litellm.ports.http to 1024, the next free one.")


def test_a_model_port_clashes_with_a_service() -> None:
    assert (
        "lab_models.extra.port and lab_services.unifi.ports.inform both want port 8080 on forge"
        in problems(lab_services={"unifi": {"node": "forge"}}, lab_models=model(port=8080, nodes="forge"))[0]
    )


def test_two_hosts_never_share_an_address() -> None:
    """Mission X4."""
    declaration = copy.deepcopy(GOOD)
    declaration["nodes"]["rig"]["ansible_host"] = "192.0.2.5"
    assert lab.validate(declaration)[0] == [
        "Hosts nuc and rig have the same address 192.0.2.5; give each its own (ansible_host or node_address)."
    ]
    declaration["nodes"]["rig"]["ansible_port"] = 2222
    assert lab.validate(declaration)[0] == []


@pytest.mark.parametrize("value", ["sk-1234", "changeme", "sk-change-me", "<your key>", "secret", "sk-xxxx"])
def test_sample_secrets_are_refused_without_being_shown(value: str) -> None:
    declaration = copy.deepcopy(GOOD)
    declaration["secrets"] = {"lab_secret_llamacpp_api_key": value}
    (problem,) = lab.validate(declaration)[0]
    assert problem.startswith("lab_secret_llamacpp_api_key is a sample value")
    assert f" {value}" not in problem


def test_a_master_key_starts_as_litellm_wants_it() -> None:
    declaration = copy.deepcopy(GOOD)
    declaration["secrets"] = {"lab_secret_litellm_master_key": "a-long-and-real-one"}
    assert lab.validate(declaration)[0] == [
        "lab_secret_litellm_master_key has to start with sk-; LiteLLM refuses other master keys."
    ]


def test_one_machine_is_legal_and_warned_of() -> None:
    declaration = {
        "nodes": {"one": {"ansible_connection": "local"}},
        "groups": {"control": ["one"], "inference": ["one"], "library": []},
        "lab": {"lab_models": {"chat": {"source": {"file": "/x.gguf"}}}, "lab_services": {"litellm": {"node": "one"}}},
        "secrets": {},
        "problems": [],
    }
    found, warnings = lab.validate(declaration)
    assert found == []
    assert any("one machine" in warning for warning in warnings)


def test_hosts_that_contradict_each_other_are_named() -> None:
    collected = lab.collect({"a": {"lab_domain": "x.org"}, "b": {"lab_domain": "y.org"}}, {"inference": ["a"]})
    assert collected["problems"] == [
        "lab_domain of host b differs from that of another host; the lab has one, write it below all."
    ]


def test_fallbacks_follow_the_category_and_never_close_a_circle() -> None:
    registry = lab.models(
        {
            "lab": {
                "lab_models": {
                    "a": {"source": {"file": "/a"}, "categories": ["chat"], "priority": 10},
                    "b": {"source": {"file": "/b"}, "categories": ["chat"], "priority": 90},
                    "c": {"source": {"file": "/c"}, "categories": ["code"], "fallbacks": ["b"]},
                    "d": {"source": {"file": "/d"}, "categories": ["chat", "code"], "priority": 50},
                    "e": {"source": {"file": "/e"}, "categories": ["embed"]},
                    "f": {"source": {"file": "/f"}, "categories": ["embed"]},
                }
            }
        }
    )
    assert list(registry) == ["b", "c", "d", "e", "f", "a"]
    assert lab.category_order(registry)["chat"] == ["b", "d", "a"]
    # d would fall back to nothing in code: c stands before it. Embedding models never stand in for each other.
    assert lab.fallbacks(registry) == {"b": ["d", "a"], "c": ["b"], "d": ["a"]}
    registry = lab.models(
        {
            "lab": {
                "lab_models": {
                    "a": {"source": {"file": "/a"}, "categories": ["chat"]},
                    "b": {"source": {"file": "/b"}, "categories": ["chat"], "fallbacks": ["a"]},
                }
            }
        }
    )
    assert lab.fallbacks(registry) == {"b": ["a"]}


@pytest.mark.parametrize(
    ("size", "expected"), [("8GiB", 8192), ("1.5GiB", 1536), ("512MiB", 512), ("1GB", 954), ("0.1MiB", 1)]
)
def test_sizes_round_up_to_whole_mib(size: str, expected: int) -> None:
    assert lab.mib(size) == expected


def test_two_spellings_of_a_path_declare_the_same_model() -> None:
    def models(path: object) -> object:
        return lab.collect({"a": {"lab_models": {"chat": {"source": {"file": path}}}}}, {})["lab"]["lab_models"]

    assert models("/labs/box/../../models/a.gguf") == models("/models/a.gguf")
    assert models("/models/b.gguf") != models("/models/a.gguf")
    # What is no path is for the validation to name.
    assert models(7) == {"chat": {"source": {"file": 7}}}
    assert lab.collect({"a": {"lab_models": ["chat"]}}, {})["lab"]["lab_models"] == ["chat"]
