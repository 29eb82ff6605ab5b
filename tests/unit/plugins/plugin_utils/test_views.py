# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From declaration and lock to the views; the lock's own rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import lab, planning, views
from ansible_collections.homelab.inference.plugins.plugin_utils import lock as lock_module
from ansible_collections.homelab.inference.plugins.plugin_utils.schema import load

CATALOGUE = load("catalogue.yml")
DECLARATION: dict[str, Any] = {
    "nodes": {
        "nuc": {"ansible_host": "192.0.2.5"},
        "forge": {"ansible_host": "192.0.2.20", "node_library": ["/srv/models"]},
        "rig": {"ansible_host": "192.0.2.30", "node_tier": "nas"},
    },
    "groups": {"control": ["nuc"], "inference": ["forge", "rig"], "library": []},
    "lab": {
        "lab_registry_mirror": "http://192.0.2.1:5000",
        "lab_models": {
            "chat": {"source": {"library": "chat.gguf"}, "replicas": 2, "categories": ["chat", "fast"]},
            "code": {"source": {"url": "https://x/code.gguf"}, "categories": ["code"], "fallbacks": ["chat"]},
        },
        "lab_services": {"litellm": {"node": "nuc"}},
    },
}
CPU = {"devices": [], "memory_mib": 8192, "cpus": 4, "library": []}
FILE = {"name": "chat.gguf", "size": 10, "sha256": "ab", "host": "forge", "path": "/srv/models/chat.gguf"}


def instance(name: str, host: str, library: dict[str, str] | None) -> dict[str, Any]:
    options = {"ctx-size": 4096, "parallel": 2, "cache-type-k": "f16"}
    return {
        "name": name,
        "model": name.split("-")[0],
        "mode": "chat",
        "node": host,
        "backend": "cpu",
        "devices": [],
        "port": 8080,
        "start": 1,
        "server_options": options,
        "memory": {"host": 100},
        "library": library,
    }


LOCK: dict[str, Any] = {
    "lock_version": 1,
    "declared": views.declared(DECLARATION),
    "images": {
        "inference_node_images": {"cpu": "ghcr.io/x/llama:1"},
        "haproxy_image": "docker.io/x/haproxy:1",
        "litellm_image": "ghcr.io/x/litellm:1",
    },
    "digests": {"192.0.2.1:5000/ghcr.io/x/llama:1": None, "192.0.2.1:5000/ghcr.io/x/litellm:1": "sha256:ab"},
    "nodes": {"forge": CPU, "rig": CPU},
    "models": {
        "chat": {"files": [FILE], "shape": {}},
        "code": {
            "files": [{"name": "code.gguf", "size": 5, "sha256": None, "url": "https://x/code.gguf"}],
            "shape": {},
        },
    },
    "instances": [
        instance("chat", "forge", {"library": "/srv/models", "path": "chat.gguf"}),
        instance("chat-2", "rig", None),
        {**instance("code", "rig", None), "port": 8081},
    ],
    "refused": [],
}


def test_roles_follow_groups_and_services() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)
    assert derived["nuc"]["roles"] == ["docker_host", "litellm", "haproxy"]
    assert derived["forge"]["roles"] == ["docker_host", "inference_node"]
    assert derived["rig"]["tier"] == "NAS"
    assert derived["nuc"]["docker_host"] == {"insecure_registries": ["192.0.2.1:5000"]}
    native = copy.deepcopy(DECLARATION)
    native["nodes"]["rig"]["node_runtime"] = "native"
    assert views.views(native, LOCK, CATALOGUE)["rig"]["roles"] == []


def watched() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the lab with Prometheus and Alertmanager beside the gateway, and its lock."""
    declaration, lock = copy.deepcopy(DECLARATION), copy.deepcopy(LOCK)
    declaration["lab"]["lab_services"] |= {"prometheus": {"node": "nuc"}, "alertmanager": {"node": "nuc"}}
    declaration["groups"]["control"] = ["nuc"]
    lock["images"] |= {"prometheus_image": "docker.io/x/prom:1", "alertmanager_image": "docker.io/x/alert:1"}
    return declaration, lock


def test_a_lab_that_is_watched_has_roles_for_it_and_one_that_is_not_has_none() -> None:
    declaration, lock = watched()
    derived = views.views(declaration, lock, CATALOGUE)
    assert derived["nuc"]["roles"] == [
        *("docker_host", "litellm", "prometheus", "alertmanager", "haproxy", "node_exporter", "controller", "healer")
    ]
    assert derived["forge"]["roles"] == ["docker_host", "inference_node", "node_exporter"]
    assert derived["nuc"]["healer"]["nodes"] == ["nuc", "forge", "rig"]
    assert derived["nuc"]["alertmanager"]["door"] == f"http://{derived['nuc']['address']}:9099/hooks/recover"
    assert views.image_variables(declaration)[-2:] == ["prometheus_image", "alertmanager_image"]
    assert lab.generated_secrets(declaration)[-1] == "lab_secret_healer"
    plain = views.views(DECLARATION, LOCK, CATALOGUE)
    assert not {"healer", "prometheus", "node_exporter"} & {role for view in plain.values() for role in view["roles"]}
    assert len(lab.generated_secrets(DECLARATION)) == 2
    assert len(views.image_variables(DECLARATION)) == 3


def test_each_node_has_its_alerts_and_a_guest_that_is_off_is_none() -> None:
    declaration, lock = watched()
    declaration["nodes"]["rig"]["node_presence"] = "guest"
    view = views.views(declaration, lock, CATALOGUE)["nuc"]["prometheus"]
    rules = {group["name"]: {rule["alert"]: rule for rule in group["rules"]} for group in view["rule_groups"]}
    assert list(rules) == ["nuc", "forge", "rig"]
    assert set(rules["nuc"]) == {"NodeDown", "ContainerEngineDown", "GatewayDown", "BalancerDown"}
    assert set(rules["forge"]) == {"NodeDown", "ContainerEngineDown", "ModelServerDown", "ModelServerLoading"}
    assert "NodeDown" not in rules["rig"]
    assert 'server=~"chat-2|code"' in rules["rig"]["ModelServerDown"]["expr"]
    assert all(rule["labels"] == {"node": host} for host, found in rules.items() for rule in found.values())
    assert [job["job"] for job in view["scrape_configs"]] == ["node", "haproxy"]
    elsewhere = copy.deepcopy(declaration)
    elsewhere["lab"]["lab_services"]["litellm"] = {"node": "forge"}
    view = views.views(elsewhere, lock, CATALOGUE)["nuc"]["prometheus"]
    assert [job["job"] for job in view["scrape_configs"]] == ["node"], "it does not reach HAProxy there"


def test_a_file_in_the_library_is_mounted_and_handed_over_to_the_node_that_lacks_it() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)
    (at_home,) = derived["forge"]["inference_node"]["instances"]
    assert (at_home["volume"], at_home["library"], at_home["files"]) == ("library-srv-models", "/srv/models", [])
    away, code = derived["rig"]["inference_node"]["instances"]
    (file,) = away["files"]
    assert file["controller_path"].endswith("/10-chat.gguf") and "path" not in file
    assert derived["forge"]["hands_over"] == [{"path": "/srv/models/chat.gguf", "cache": file["controller_path"]}]
    assert code["files"] == [{"name": "code.gguf", "size": 5, "url": "https://x/code.gguf"}]
    assert code["image"] == "192.0.2.1:5000/ghcr.io/x/llama:1"


def test_a_projector_lies_beside_its_model() -> None:
    model = {"mmproj": "mmproj-F16.gguf"}
    assert views.projector(model, None) == {"mmproj": "/models/mmproj-F16.gguf"}
    assert views.projector(model, {"library": "/m", "path": "a/b.gguf"}) == {"mmproj": "/models/a/mmproj-F16.gguf"}
    assert views.projector({"mmproj": None}, None) == {}


def taking_turns() -> dict[str, Any]:
    at_home = {"library": "/srv/models", "path": "a/chat.gguf"}
    chat, code = instance("chat", "rig", at_home), instance("code", "rig", None)
    pair = [{**chat, "turns": ["code"], "memory": {"host": 300}}, {**code, "turns": ["chat"]}]
    lock = {**LOCK, "instances": pair, "models": copy.deepcopy(LOCK["models"])}
    lock["models"]["chat"]["mmproj"] = "mmproj.gguf"
    return lock


def test_models_that_take_turns_share_a_server() -> None:
    lock = taking_turns()
    derived = views.views(DECLARATION, lock, CATALOGUE)
    (server,) = derived["rig"]["inference_node"]["instances"]
    assert (server["name"], server["port"]) == ("chat", 8080)
    assert [(one["alias"], one["volume"], one["model_file"]) for one in server["models"]] == [
        ("chat", "library-srv-models", "a/chat.gguf"),
        ("code", "model-code", "code.gguf"),
    ]
    # Each volume is a directory of its own in the container.
    assert server["models"][0]["server_options"]["mmproj"] == "/models/library-srv-models/a/mmproj.gguf"
    assert [(one["volume"], one["library"], len(one["files"])) for one in server["volumes"]] == [
        ("library-srv-models", "/srv/models", 0),
        ("model-code", None, 1),
    ]
    # What the module takes, and nothing else: of a model the module wants no files.
    assert set(server["models"][1]) == {"alias", "mode", "server_options", "volume", "model_file"}
    # The gateway asks one address for both, by name; health asks once, and wakes nobody.
    assert [one["name"] for one in derived["nuc"]["litellm"]["deployments"]] == ["chat", "code"]
    both = derived["nuc"]["haproxy"]["models"]
    assert [one["name"] for one in both] == ["chat", "code"]
    assert both[0]["servers"] == both[1]["servers"] == [{"name": "chat", "address": "192.0.2.30", "port": 8080}]
    asked = [one for one in views.endpoints(DECLARATION, lock, CATALOGUE) if one["kind"] == "llamacpp"]
    assert [(one["name"], one["mode"]) for one in asked] == [("nas/chat", "turns")]
    assert derived["rig"]["containers"] == []
    assert views.goes_away(derived, {"rig": ["llamacpp-chat", "llamacpp-code"]}) == {"rig": ["llamacpp-code"]}


def test_a_path_in_a_models_volume_goes_with_it() -> None:
    lock = taking_turns()
    lock["instances"][1]["server_options"] = {"spec-draft-model": "/models/small.gguf", "lora": ["/models/a", "b"]}
    ((server,),) = [views.views(DECLARATION, lock, CATALOGUE)["rig"]["inference_node"]["instances"]]
    options = server["models"][1]["server_options"]
    assert options["spec-draft-model"] == "/models/model-code/small.gguf"
    assert options["lora"] == ["/models/model-code/a", "b"]
    lock["instances"] = [{**lock["instances"][1], "turns": []}]
    (alone,) = views.views(DECLARATION, lock, CATALOGUE)["rig"]["inference_node"]["instances"]
    assert alone["server_options"]["spec-draft-model"] == "/models/small.gguf"


def test_a_lock_with_a_port_for_each_of_them_is_served_behind_the_first() -> None:
    """As versions before this one wrote them."""
    lock = taking_turns()
    lock["instances"][1]["port"] = 8081
    derived = views.views(DECLARATION, lock, CATALOGUE)
    assert derived["rig"]["inference_node"]["instances"][0]["port"] == 8080
    assert {one["port"] for model in derived["nuc"]["haproxy"]["models"] for one in model["servers"]} == {8080}


def test_where_models_take_turns_nobody_knows_what_is_ours() -> None:
    instances = taking_turns()["instances"]
    assert views.awake(instances, "rig", ["llamacpp-chat"]) == {"host"}
    assert (
        views.awake(instances, "rig", []) == set() and views.awake(instances[:1], "forge", ["llamacpp-chat"]) == set()
    )


def test_of_models_that_take_turns_the_largest_is_what_runs() -> None:
    instances = taking_turns()["instances"]
    assert views.planned_memory(instances, "rig", ["llamacpp-chat"]) == {"host": 300}
    assert views.planned_memory(instances, "rig", ["llamacpp-code"]) == {}


def test_the_gateway_knows_every_server_its_fallbacks_and_categories() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)["nuc"]
    gateway = derived["litellm"]
    assert [(one["name"], one["api_base"]) for one in gateway["deployments"]] == [
        ("chat", "http://haproxy:8080/chat"),
        ("code", "http://haproxy:8080/code"),
    ]
    assert derived["haproxy"]["models"] == [
        {
            "name": "chat",
            "servers": [
                {"name": "chat", "address": "192.0.2.20", "port": 8080},
                {"name": "chat-2", "address": "192.0.2.30", "port": 8080},
            ],
        },
        {"name": "code", "servers": [{"name": "code", "address": "192.0.2.30", "port": 8081}]},
    ]
    assert gateway["network"] == derived["haproxy"]["network"]
    assert gateway["fallbacks"] == {"code": ["chat"]}
    # chat and code are models themselves: only fast needs another name.
    assert gateway["aliases"] == {"fast": "chat"}


def test_an_image_is_pulled_by_the_digest_that_the_plan_knows() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)
    assert derived["nuc"]["litellm"]["image"] == "192.0.2.1:5000/ghcr.io/x/litellm@sha256:ab"
    known = {**LOCK, "digests": {"192.0.2.1:5000/ghcr.io/x/llama:1": "sha256:cd"}}
    (server,) = views.views(DECLARATION, known, CATALOGUE)["forge"]["inference_node"]["instances"]
    assert server["image"] == "192.0.2.1:5000/ghcr.io/x/llama@sha256:cd"
    wanted = [f"192.0.2.1:5000/{name}:1" for name in ("ghcr.io/x/llama", "docker.io/x/haproxy", "ghcr.io/x/litellm")]
    assert views.planned_images(DECLARATION, LOCK["images"], LOCK["instances"]) == wanted
    asked = {"declaration": DECLARATION, "images": LOCK["images"], "lock": LOCK, "declared": {}}
    empty: dict[str, Any] = {
        "refused": [],
        "nodes": {},
        "order": {},
        "devices": {},
        "survival": [],
        "value": 0.0,
        "inputs": "",
    }
    plan = {"instances": LOCK["instances"], **empty}
    made = planning.make_lock(asked, {}, plan, {wanted[0]: "sha256:cd"})
    assert made["digests"] == {wanted[0]: "sha256:cd", wanted[1]: None, wanted[2]: "sha256:ab"}


def test_endpoints_have_tier_and_timeout() -> None:
    declaration = copy.deepcopy(DECLARATION)
    declaration["lab"]["lab_tiers"] = {"nas": {"timeout": 30}}
    found = views.endpoints(declaration, LOCK, CATALOGUE)
    assert [(one["name"], one["timeout"]) for one in found] == [
        ("remote/chat", 8),
        ("nas/chat-2", 30),
        ("nas/code", 30),
        ("gateway/litellm", 8),
    ]


def test_what_is_there_and_not_wanted_goes_away() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)
    found = {"forge": ["llamacpp-chat", "llamacpp-old", "litellm"], "nuc": ["litellm"], "rig": []}
    assert views.goes_away(derived, found) == {"forge": ["llamacpp-old", "litellm"]}


def test_facts_come_before_declared_hardware_and_a_silent_host_keeps_what_it_declared() -> None:
    declaration = copy.deepcopy(DECLARATION)
    declaration["nodes"]["rig"] |= {"node_gpus": [], "node_memory_mib": 512}
    declaration["lab"]["lab_reservations"] = {"forge": [{"memory": "1GiB", "for": "x"}, {"memory": "1MiB", "for": "y"}]}
    nodes = views.planner_nodes(declaration, {"forge": CPU}, CATALOGUE)
    assert nodes["forge"]["memory_mib"] == 8192
    assert nodes["forge"]["reservations"] == {"host": 1025}
    assert nodes["rig"]["memory_mib"] == 512
    assert "rig" not in views.planner_nodes(DECLARATION, {"forge": CPU}, CATALOGUE)


def test_the_lock_reads_back_as_it_was_written() -> None:
    text = lock_module.render(LOCK)
    assert lock_module.parse(text, "x") == LOCK
    assert lock_module.render(lock_module.parse(text, "x")) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "Cannot read the lock here"),
        ("just: yaml", "here is not a lock"),
        ("lock_version: 99", "has version 99, this collection writes version 1"),
    ],
)
def test_a_bad_lock_says_what_to_do(text: str, sentence: str) -> None:
    with pytest.raises(lock_module.LockError, match=sentence):
        lock_module.parse(text, "here")


def test_a_changed_declaration_is_named_key_by_key() -> None:
    changed = copy.deepcopy(LOCK["declared"])
    changed["models"]["chat"]["replicas"] = 1
    changed["models"]["new"] = {}
    del changed["models"]["code"]
    assert lock_module.differences(LOCK["declared"], changed) == [
        "models.chat.replicas was 2, is 1",
        "models.code is gone",
        "models.new is new",
    ]


def test_a_file_of_a_library_is_found_by_name_or_path_with_its_shards() -> None:
    shard = {"name": "b-00001-of-00002.gguf", "path": "x/b-00001-of-00002.gguf", "size": 1, "sha256": None}
    other = {**shard, "name": "b-00002-of-00002.gguf", "path": "x/b-00002-of-00002.gguf"}
    entry = {**shard, "library": "/m", "commit": None, "shape": {"quant": "Q4_0"}, "shards": [shard, other]}
    models = {"b": {"source": {"library": "x/b-00001-of-00002.gguf"}}, "c": {"source": {"library": "c.gguf"}}}
    resolved = planning.resolve(models, [], {"nas": [entry]}, None)
    assert [file["path"] for file in resolved["b"]["files"]] == [
        "/m/x/b-00001-of-00002.gguf",
        "/m/x/b-00002-of-00002.gguf",
    ]
    assert "c" not in resolved
    assert planning.unresolved(models, [{"model": "z", "error": "no such repository."}], {"nas": []}) == {
        "z": "no such repository",
        "b": "x/b-00001-of-00002.gguf lies in no node_library (nas answered)",
        "c": "c.gguf lies in no node_library (nas answered)",
    }
    known = {"models": {"c": {"files": []}}, "declared": {"models": {"c": {"source": {"library": "c.gguf"}}}}}
    assert planning.resolve(models, [], {}, known) == {"c": {"files": []}}
    known["declared"]["models"]["c"]["source"] = {"library": "another.gguf"}
    assert planning.resolve(models, [], {}, known) == {}


def test_what_was_learned_of_a_card_goes_into_the_plan() -> None:
    learned = {"forge": {"gpu0": 640}}
    nodes = views.planner_nodes(DECLARATION, {"forge": CPU, "rig": CPU}, CATALOGUE, learned)
    assert nodes["forge"]["overheads"] == {"gpu0": 640} and "overheads" not in nodes["rig"]


def test_nodes_in_maintenance_and_guests_may_be_away_and_the_first_get_no_requests() -> None:
    declaration = copy.deepcopy(DECLARATION)
    assert {one["may_be_away"] for one in views.endpoints(declaration, LOCK, CATALOGUE)} == {False}
    declaration["nodes"]["forge"]["node_presence"] = "guest"
    found = views.endpoints(declaration, LOCK, CATALOGUE, {"rig": "2030-01-01T00:00:00+00:00"})
    assert [one["name"] for one in found if not one["may_be_away"]] == ["gateway/litellm"]
    derived = views.views(declaration, LOCK, CATALOGUE, ["rig"])
    assert derived["nuc"]["haproxy"]["drained"] == ["chat-2", "code"]
    assert views.views(declaration, LOCK, CATALOGUE)["nuc"]["haproxy"]["drained"] == []


def test_a_host_is_owed_what_it_does_not_hold() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)
    held = {host: {"instances": copy.deepcopy(view["inference_node"]["instances"])} for host, view in derived.items()}
    assert views.owed(derived, held) == {}
    held["forge"]["instances"][0]["port"] = 1
    held["rig"]["instances"].pop()
    held["rig"]["instances"].append({"name": "old"})
    assert views.owed(derived, held) == {"forge": ["chat"], "rig": ["code", "old"]}
    assert views.owed(derived, {"forge": {}, "nuc": {}}) == {"forge": ["chat"]}


def test_what_only_runs_elsewhere_is_not_given_up_before_it_is_where_it_goes() -> None:
    derived = views.views(DECLARATION, LOCK, CATALOGUE)
    planned = views.model_servers(DECLARATION, LOCK)
    before = {"forge": {"instances": [{"name": "chat", "model": "chat"}, {"name": "code", "model": "code"}]}, "rig": {}}
    leaves = {"forge": ["llamacpp-code"]}

    def given_up(up: list[str], gateways: list[str]) -> list[str]:
        return views.given_up(derived, planned, before, leaves, up, gateways)

    assert given_up(["forge", "rig"], ["nuc"]) == []
    # rig, to which code moves, failed; chat has a server on forge all the same.
    assert given_up(["forge"], ["nuc"]) == ["code is served by forge and planned for rig, without it so far"]
    assert given_up(["forge", "rig"], []) == ["the gateway on nuc cannot be told that forge changes"]
    # Nothing moves: a host that is away holds up nobody.
    before["rig"] = {"instances": [{"name": "chat-2", "model": "chat"}, {"name": "code", "model": "code"}]}
    before["forge"]["instances"].pop()
    leaves = {}
    assert given_up(["forge"], []) == []
    before["rig"] = {"instances": [{"name": "turns", "models": [{"alias": "code"}]}]}
    assert given_up(["rig"], []) == []
