# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The declared lab: read it from the inventory, validate the whole of it, bring it into one normal form.

Everything here is pure: dictionaries in, dictionaries and sentences out. What each host needs is derived in views.py.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils.schema import Checker, load, nearest

GROUPS = ("control", "inference", "library")
SOURCES = ("hf", "url", "library", "file", "ollama", "triton")
ENGINE_SOURCES = {"llamacpp": ("hf", "url", "library", "file"), "ollama": ("ollama",), "triton": ("triton",)}
# Words of one run, given with -e; they are no part of the declaration.
RUN_WORDS = (
    "lab_accept_drift",
    "lab_confirm_removal",
    "lab_health_file",
    "lab_offline",
    "lab_plan_html",
    "lab_plan_json",
    "lab_remove_data",
    "lab_restart",
    "lab_restart_anyway",
    "lab_strict",
    "lab_take_back",
)
# Secrets that this collection makes itself when they are absent; the last where alerts are told to the healer.
HEALER_SECRET = "lab_secret_healer"
GENERATED_SECRETS = ("lab_secret_litellm_master_key", "lab_secret_llamacpp_api_key", HEALER_SECRET)
SAMPLE = re.compile(
    r"^(sk-)?(1234|change-?me!?|your[-_ ].*|xxx+|<.*>|example|sample|secret|password|passw0rd|token|todo|test|admin)$",
    re.I,
)

# llama-server options that the plan or the server's module owns, by every spelling, with what to write instead.
OWNED_ARGS = {
    **dict.fromkeys(("host", "reuse-port"), "node_address says where a server is reached"),
    "port": "the model's key port",
    **dict.fromkeys(("model", "m", "hf-repo", "hf-file", "hf", "hff", "model-url", "mu"), "the model's key source"),
    **dict.fromkeys(("mmproj", "mmproj-url", "mmproj-auto", "mm"), "source.mmproj"),
    "alias": "the model's own name is its alias",
    **dict.fromkeys(("ctx-size", "c"), "the model's key context"),
    **dict.fromkeys(("parallel", "np"), "the model's key slots"),
    **dict.fromkeys(("cache-type-k", "cache-type-v", "ctk", "ctv"), "the model's key kv"),
    **dict.fromkeys(
        ("device", "dev", "main-gpu", "mg", "split-mode", "sm", "tensor-split", "ts"),
        "the plan chooses devices; pin with nodes",
    ),
    **dict.fromkeys(
        ("n-gpu-layers", "gpu-layers", "ngl", "cpu-moe", "cmoe", "n-cpu-moe", "ncmoe"), "the plan chooses the layers"
    ),
    **dict.fromkeys(("override-tensor", "ot", "rpc"), "the plan chooses where tensors lie"),
    **dict.fromkeys(("fit", "fit-target", "fit-ctx", "fitt", "fitc"), "the plan takes the place of fit"),
    **dict.fromkeys(("cache-ram", "cram"), "the plan sets the prompt cache"),
    **dict.fromkeys(("api-key", "api-key-file"), "lab_secret_llamacpp_api_key"),
    **dict.fromkeys(("embedding", "embeddings"), "categories: [embed]"),
    **dict.fromkeys(("metrics", "slots", "threads", "t"), "the server's module sets it"),
}


def collect(hostvars: dict[str, dict[str, Any]], groups: dict[str, list[str]]) -> dict[str, Any]:
    """Pick the declaration out of an inventory.

    :param hostvars: per host its variables, values already templated.
    :returns: C({lab, nodes, groups, secrets, problems}): lab and secrets by variable, nodes per host its C(node_*) and
        C(ansible_*) variables, groups the hosts by group, problems as sentences.
    """
    lab: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    nodes: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for host, variables in hostvars.items():
        nodes[host] = {key: value for key, value in variables.items() if key.startswith(("node_", "ansible_"))}
        for key, value in variables.items():
            if not key.startswith("lab_") or key in RUN_WORDS:
                continue
            target = secrets if key.startswith("lab_secret_") else lab
            if key not in target:
                target[key] = value
            elif target[key] != value:
                problems.append(
                    f"{key} of host {host} differs from that of another host; the lab has one, write it below all."
                )
    if isinstance(lab.get("lab_models"), dict):
        lab["lab_models"] = {name: _one_path(model) for name, model in lab["lab_models"].items()}
    return {
        "lab": lab,
        "nodes": nodes,
        "groups": {name: [host for host in groups.get(name, []) if host in nodes] for name in GROUPS},
        "secrets": secrets,
        "problems": sorted(set(problems)),
    }


def _one_path(model: Any) -> Any:
    """Return a model whose file has one spelling, as the lock keeps it."""
    source = model.get("source") if isinstance(model, dict) else None
    if not isinstance(source, dict) or not isinstance(source.get("file"), str) or not source["file"]:
        return model
    return {**model, "source": {**source, "file": os.path.normpath(source["file"])}}


def address(node: dict[str, Any], host: str) -> str:
    """Return the address at which the lab reaches a node (declaration.md: node_address)."""
    return str(node.get("node_address") or node.get("ansible_host") or host)


def door_host(declaration: dict[str, Any]) -> str | None:
    """Return the host with the alert door: where alerts are told to somebody, the first of group control."""
    told = "node" in declaration["lab"].get("lab_services", {}).get("alertmanager", {})
    return declaration["groups"]["control"][0] if told and declaration["groups"]["control"] else None


def generated_secrets(declaration: dict[str, Any]) -> list[str]:
    """Return the names of the secrets that this lab needs and that this collection makes where they are absent."""
    return [name for name in GENERATED_SECRETS if name != HEALER_SECRET or door_host(declaration)]


def listed(value: Any) -> list[Any]:
    """Return a ladder as a list; a scalar is a list of one."""
    return list(value) if isinstance(value, list) else [value]


def normal_model(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """Return a model with all defaults filled in and all ladders as lists; None stands for 'derived from the file'."""
    keep = listed(model.get("keep", "always"))
    return {
        "name": name,
        "engine": model.get("engine", "llamacpp"),
        "source": model["source"],
        "context": listed(model["context"]) if "context" in model else None,
        "kv": listed(model.get("kv", ["f16", "q8_0"])),
        "slots": listed(model.get("slots", 1 if keep[0] == "on-demand" else 2)),
        "nodes": listed(model["nodes"]) if "nodes" in model else None,
        "replicas": model.get("replicas", 1),
        "categories": model.get("categories", []),
        "mode": "embedding" if "embed" in model.get("categories", []) else "chat",
        "priority": model.get("priority", 50),
        "keep": keep,
        "fallbacks": model.get("fallbacks"),
        "port": model.get("port"),
        "args": model.get("args", {}),
    }


def models(declaration: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the registry in normal form, first those that keep their place longest: by priority, then as written."""
    written = [normal_model(name, model) for name, model in declaration["lab"].get("lab_models", {}).items()]
    return {model["name"]: model for model in sorted(written, key=lambda model: -model["priority"])}


def category_order(registry: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return for each category its models in order (declaration.md rule 8)."""
    order: dict[str, list[str]] = {}
    for name, model in registry.items():
        for category in model["categories"]:
            order.setdefault(category, []).append(name)
    return order


def fallbacks(registry: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return for each model whom to ask instead: the declared list, else the next models of its categories.

    A derived fallback never closes a circle, and there is none between embedding models: their vectors do not compare.
    """
    result = {name: list(model["fallbacks"]) for name, model in registry.items() if model["fallbacks"] is not None}
    for category, order in category_order(registry).items():
        if category == "embed":
            continue
        for number, name in enumerate(order):
            if registry[name]["fallbacks"] is not None:
                continue
            for other in order[number + 1 :]:
                if other not in result.get(name, []) and not reaches(result, other, name):
                    result.setdefault(name, []).append(other)
    return {name: result[name] for name in registry if result.get(name)}


def reaches(edges: dict[str, list[str]], start: str, goal: str) -> bool:
    """Say whether C(goal) can be reached from C(start)."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            todo += edges.get(name, [])
    return False


def mib(size: str) -> int:
    """Return a size such as C(8GiB) in MiB, rounded up."""
    number, unit = re.fullmatch(r"([0-9.]+)(MiB|GiB|MB|GB)", size).groups()
    factor = {"MiB": 1.0, "GiB": 1024.0, "MB": 1e6 / 2**20, "GB": 1e9 / 2**20}[unit]
    return -int(-float(number) * factor // 1)


def service_ports(declaration: dict[str, Any], catalogue: dict[str, Any]) -> dict[str, dict[int, str]]:
    """Return per host the ports that its declared services take, first come first served.

    :returns: C({host: {port: 'service (name)'}}).
    """
    ports: dict[str, dict[int, str]] = {}
    for service, port_name, host, number in declared_ports(declaration, catalogue):
        ports.setdefault(host, {}).setdefault(number, f"{service} ({port_name})")
    return ports


def declared_ports(declaration: dict[str, Any], catalogue: dict[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Yield C((service, port name, host, port)) for each port of each service that the lab deploys."""
    for service, entry in (declaration["lab"].get("lab_services") or {}).items():
        if service in catalogue and isinstance((entry or {}).get("node"), str):
            for port_name, number in {**catalogue[service]["ports"], **entry.get("ports", {})}.items():
                yield service, port_name, entry["node"], number


def validate(declaration: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return C((problems, warnings)); without problems the lab is good.

    Every sentence names the object, the cause and what to do.
    """
    problems, warnings = _validate(declaration)
    return [problem.replace("?.", "?") for problem in problems], warnings


def _validate(declaration: dict[str, Any]) -> tuple[list[str], list[str]]:
    schema = load("schema.yml")
    catalogue = load("catalogue.yml")
    problems = [*declaration["problems"], *_keys(declaration, schema)]
    if problems:
        # What follows reads the values; it relies on their form.
        return [*problems, *_addresses(declaration)], []
    problems += [
        *_addresses(declaration),
        *_wakes(declaration),
        *_doors(declaration),
        *_services(declaration, catalogue),
        *_ports(declaration, catalogue),
        *_models(declaration),
        *_reservations(declaration),
        *_networks(declaration),
        *_secrets(declaration, catalogue),
    ]
    return problems, [] if problems else list(_warnings(declaration, catalogue))


def _keys(declaration: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """Check names and forms of all keys against the schema."""
    checker = Checker(schema)
    yield from checker.check(declaration["lab"], {**schema, "properties": _only(schema, "lab_")}, "")
    for host, node in declaration["nodes"].items():
        own = {key: value for key, value in node.items() if key.startswith("node_")}
        yield from checker.check(own, {**schema, "properties": _only(schema, "node_")}, host)


def _only(schema: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key: entry for key, entry in schema["properties"].items() if key.startswith(prefix)}


def _addresses(declaration: dict[str, Any]) -> Iterator[str]:
    """No two hosts share an address (mission X4)."""
    owners: dict[str, list[str]] = {}
    for host, node in declaration["nodes"].items():
        further = node.get("node_addresses")
        for one in {address(node, host), *(further.values() if isinstance(further, dict) else [])}:
            owners.setdefault(str(one), []).append(host)
    for one, hosts in owners.items():
        # Hosts may share a jump address with different ports, and one machine may be listed twice as a local
        # connection.
        ports = {declaration["nodes"][host].get("ansible_port", 22) for host in hosts}
        if len(hosts) > 1 and len(ports) < len(hosts):
            yield (
                f"Hosts {' and '.join(hosts)} have the same address {one}; "
                "give each its own (ansible_host or node_address)."
            )


def _wakes(declaration: dict[str, Any]) -> Iterator[str]:
    """Who is woken can be."""
    for host, node in declaration["nodes"].items():
        wake = node.get("node_wake", {})
        if wake.get("method") == "wol" and "mac" not in wake:
            yield f"{host}: node_wake.mac is missing; Wake-on-LAN needs the address of the machine's network card."
        if wake.get("method") == "plug" and not str(wake.get("address", "")).startswith(("http://", "https://")):
            yield (
                f"{host}: node_wake.address is no URL; give the one that switches the plug on, "
                "for example http://10.0.0.7/relay/0?turn=on."
            )


def _doors(declaration: dict[str, Any]) -> Iterator[str]:
    """Who repairs the lab reaches its hosts as they are declared."""
    door = door_host(declaration)
    for host, node in declaration["nodes"].items():
        if door and host != door and node.get("ansible_connection") == "local":
            yield (
                f"{host} has ansible_connection local, and {door} is to repair the lab by itself and would take itself "
                f"for {host}; give {host} its ansible_host and let Ansible log in, or make it the control node."
            )


def _services(declaration: dict[str, Any], catalogue: dict[str, Any]) -> Iterator[str]:
    """Services are known, and each says where it is."""
    for service, entry in declaration["lab"].get("lab_services", {}).items():
        where = f"lab_services.{service}"
        if service not in catalogue:
            hint = nearest(service, catalogue) or "; known are " + ", ".join(catalogue)
            yield f"{where} is not a known service{hint}."
            continue
        if ("node" in entry) == ("external" in entry):
            yield f"{where} has to say either node (the host that runs it) or external (the address of your own)."
        elif "node" in entry and entry["node"] not in declaration["nodes"]:
            hint = nearest(entry["node"], declaration["nodes"])
            yield f"{where}.node is {entry['node']!r}, which is no host of the inventory{hint}."
        known = catalogue[service]["ports"]
        for port_name in entry.get("ports", {}):
            if port_name not in known:
                hint = nearest(port_name, known) or "; it has " + ", ".join(known)
                yield f"{where}.ports.{port_name} is not a port of {service}{hint}."


def _ports(declaration: dict[str, Any], catalogue: dict[str, Any]) -> Iterator[str]:
    """No two things on one node want the same port (mission X5); the sentence names the next free one."""
    wanted: dict[str, list[tuple[str, int]]] = {}
    for service, port_name, host, number in declared_ports(declaration, catalogue):
        wanted.setdefault(host, []).append((f"lab_services.{service}.ports.{port_name}", number))
    for model in models(declaration).values():
        if model["port"]:
            for host in model["nodes"] or declaration["groups"]["inference"]:
                wanted.setdefault(host, []).append((f"lab_models.{model['name']}.port", model["port"]))
    for host, claims in wanted.items():
        owner: dict[int, str] = {}
        taken = {number for _key, number in claims}
        for key, number in claims:
            if number in owner:
                free = _free_port(number, taken)
                taken.add(free)
                yield (
                    f"{key} and {owner[number]} both want port {number} on {host}; "
                    f"set {key} to {free}, the next free one."
                )
            else:
                owner[number] = key


def _free_port(after: int, taken: set[int]) -> int:
    """Return the next port that nothing takes; after the highest come those that need no privilege, from the lowest."""
    return next(port for port in (*range(after + 1, 65536), *range(1024, after)) if port not in taken)


def _models(declaration: dict[str, Any]) -> Iterator[str]:
    """Models name things that exist, and can be served."""
    nodes, groups = declaration["nodes"], declaration["groups"]
    registry = models(declaration)
    for name, model in registry.items():
        where = f"lab_models.{name}"
        sources = [kind for kind in SOURCES if kind in model["source"]]
        allowed = ENGINE_SOURCES[model["engine"]]
        if len(sources) != 1:
            named = " and ".join(sources) or "none"
            yield f"{where}.source has to name exactly one of {', '.join(SOURCES)}; it names {named}."
        elif sources[0] not in allowed:
            yield (
                f"{where}.source.{sources[0]} does not go with engine {model['engine']}; "
                f"use {' or '.join(allowed)}, or set engine."
            )
        elif "quant" in model["source"] and sources[0] != "hf":
            yield f"{where}.source.quant chooses among the files of a repository; with {sources[0]} leave it out."
        yield from _model_nodes(where, model, nodes, groups)
        for other in model["fallbacks"] or []:
            if other not in registry:
                yield f"{where}.fallbacks names {other!r}, which is no model of lab_models{nearest(other, registry)}."
            elif registry[other]["mode"] != model["mode"]:
                yield (
                    f"{where}.fallbacks names {other}, but one of the two is an embedding model "
                    "and cannot stand in for the other."
                )
        for option in model["args"]:
            key = option.lstrip("-")
            if option.startswith("-"):
                yield f"{where}.args.{option} has dashes; write {key!r}."
            if key in OWNED_ARGS or key.removeprefix("no-") in OWNED_ARGS:
                instead = OWNED_ARGS.get(key) or OWNED_ARGS[key.removeprefix("no-")]
                yield f"{where}.args.{option} is set by the plan; leave it out ({instead})."
    yield from _circles({name: model["fallbacks"] or [] for name, model in registry.items()})
    for category, order in category_order(registry).items():
        if category in registry and category not in registry[category]["categories"]:
            yield (
                f"lab_models.{category} has the name of the category {category}, which {order[0]} serves; "
                f"rename the model or add {category} to its categories."
            )


def _model_nodes(
    where: str, model: dict[str, Any], nodes: dict[str, Any], groups: dict[str, list[str]]
) -> Iterator[str]:
    """A model's nodes exist, serve models, and are not all guests."""
    for host in model["nodes"] or []:
        if host not in nodes:
            yield f"{where}.nodes names {host!r}, which is no host of the inventory{nearest(host, nodes)}."
        elif host not in groups["inference"]:
            yield (
                f"{where}.nodes names {host}, which is not in the group inference; add it there or choose another host."
            )
    homes = [host for host in model["nodes"] or groups["inference"] if host in nodes]
    if homes and all(nodes[host].get("node_presence") == "guest" for host in homes):
        yield f"{where} would live on guests alone ({', '.join(homes)}); add a node that is always present."
    known = all(host in nodes for host in model["nodes"] or [])
    if known and isinstance(model["replicas"], int) and len(set(homes)) < model["replicas"]:
        count = len(set(homes))
        yield (
            f"{where}.replicas is {model['replicas']}, but only {count} node{'' if count == 1 else 's'} may run it; "
            "lower it or allow more nodes."
        )


def _circles(edges: dict[str, list[str]]) -> Iterator[str]:
    """Yield one sentence for each circle of declared fallbacks."""
    reported: set[frozenset[str]] = set()

    def walk(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            circle = [*path[path.index(name) :], name]
            if frozenset(circle) not in reported:
                reported.add(frozenset(circle))
                yield (
                    f"lab_models.{circle[0]}.fallbacks goes in a circle ({' -> '.join(circle)}); take one of them out."
                )
            return
        for other in edges.get(name, []):
            yield from walk(other, [*path, name])

    for start in edges:
        yield from walk(start, [])


def _reservations(declaration: dict[str, Any]) -> Iterator[str]:
    """Reservations name hosts and devices that exist."""
    for host, entries in declaration["lab"].get("lab_reservations", {}).items():
        where = f"lab_reservations.{host}"
        if host not in declaration["nodes"]:
            yield f"{where} is for no host of the inventory{nearest(host, declaration['nodes'])}."
            continue
        gpus = declaration["nodes"][host].get("node_gpus")
        for number, entry in enumerate(entries):
            device = entry.get("device")
            if device and gpus is not None and device not in [gpu["id"] for gpu in gpus]:
                known = ", ".join(gpu["id"] for gpu in gpus) or "none"
                yield f"{where}[{number}].device is {device!r}, but {host} declares {known}."


def _networks(declaration: dict[str, Any]) -> Iterator[str]:
    """Networks are real, do not overlap, and reach only networks that exist."""
    networks = declaration["lab"].get("lab_networks", {})
    parsed: dict[str, Any] = {}
    for name, network in networks.items():
        try:
            parsed[name] = ipaddress.ip_network(network["cidr"])
        except ValueError as error:
            yield (
                f"lab_networks.{name}.cidr is {network['cidr']!r}: {error}; "
                "write the network's own address, such as 10.0.10.0/24."
            )
        for other in network.get("reaches", {}):
            if other != "internet" and other not in networks:
                hint = nearest(other, [*networks, "internet"])
                yield f"lab_networks.{name}.reaches names {other!r}, which is no network{hint}."
    names = list(parsed)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            if parsed[name].version == parsed[other].version and parsed[name].overlaps(parsed[other]):
                yield (
                    f"lab_networks.{name} and lab_networks.{other} overlap ({parsed[name]}, {parsed[other]}); "
                    "give each its own range."
                )


def _secrets(declaration: dict[str, Any], catalogue: dict[str, Any]) -> Iterator[str]:
    """Secrets that only the owner can give are there, and none is a sample."""
    needed = {
        secret: f"lab_services.{service}"
        for service, entry in declaration["lab"].get("lab_services", {}).items()
        if service in catalogue and "node" in entry
        for secret in catalogue[service].get("secrets", [])
    }
    if declaration["lab"].get("lab_alerts", {}).get("discord"):
        needed["lab_secret_discord_webhook"] = "lab_alerts.discord"
    given = declaration["secrets"]
    for name, reason in needed.items():
        if not given.get(name):
            yield (
                f"{name} is missing or empty, and {reason} needs it; "
                "set it with ansible-vault or a lookup of your secret store."
            )
    for name, value in given.items():
        if name not in needed and name not in GENERATED_SECRETS:
            yield f"{name} is not a known secret{nearest(name, [*needed, *GENERATED_SECRETS])}."
        elif not isinstance(value, str):
            yield f"{name} is not a text; put it in quotes."
        elif value and SAMPLE.match(value):
            yield f"{name} is a sample value; remove it (it is generated then) or set a real one."
        elif name == "lab_secret_litellm_master_key" and not value.startswith("sk-"):
            yield f"{name} has to start with sk-; LiteLLM refuses other master keys."


def _warnings(declaration: dict[str, Any], catalogue: dict[str, Any]) -> Iterator[str]:
    """What is legal and has a price."""
    groups, lab = declaration["groups"], declaration["lab"]
    if not groups["control"]:
        yield "No host is in the group control: nothing watches the lab and nothing heals it."
    if lab.get("lab_models") and not groups["inference"]:
        yield "No host is in the group inference: no model can be served."
    if len(declaration["nodes"]) == 1:
        yield (
            f"The lab is one machine ({', '.join(declaration['nodes'])}): "
            "when it is down, everything is, and nothing can take over."
        )
    elif not lab.get("lab_witness"):
        yield "lab_witness is not set: the healer cannot tell a dead node from its own network being cut."
    homes = {name: entry.get("node") for name, entry in lab.get("lab_services", {}).items()}
    for name, other, price in (
        ("alertmanager", "prometheus", "no alert reaches it"),
        ("prometheus", "litellm", "only machines are watched, no servers"),
    ):
        if homes.get(name) and homes.get(other) != homes[name]:
            yield f"{name} is not on the node of {other}: {price}. Give both the same lab_services.NAME.node."
    later = [
        name
        for name, entry in lab.get("lab_services", {}).items()
        if "node" in entry and not catalogue[name].get("role")
    ]
    if later:
        yield (
            f"This version plans around these services (ports, addresses) and does not deploy them: {', '.join(later)}."
        )
    for model in models(declaration).values():
        if model["engine"] == "ollama":
            yield (
                f"lab_models.{model['name']} is asked for at the Ollama of its nodes; "
                "this version neither starts Ollama nor pulls the model."
            )
        elif model["engine"] != "llamacpp":
            yield (
                f"lab_models.{model['name']} has engine {model['engine']}; "
                "this version checks it and does not start it."
            )
    for host in groups["inference"]:
        runtime = declaration["nodes"][host].get("node_runtime", "docker")
        if runtime != "docker":
            yield f"{host} has node_runtime {runtime}: it is planned, but this version starts no servers there."
