# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derives, from declaration and lock, what each role on each host needs: the views."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.placement import server_name, servers
from ansible_collections.homelab.inference.plugins.module_utils.probe import TURNS
from ansible_collections.homelab.inference.plugins.module_utils.registry import pinned
from ansible_collections.homelab.inference.plugins.plugin_utils import alerts
from ansible_collections.homelab.inference.plugins.plugin_utils import lab as lab_module

# Role variables that name images; their defaults in the roles are the one place where an image is written down.
IMAGE_VARIABLES = ("inference_node_images", "haproxy_image", "litellm_image")
# Those of services that not every lab has.
SERVICE_IMAGES = {"prometheus": "prometheus_image", "alertmanager": "alertmanager_image"}
# Where the gateway finds its model servers: role haproxy's container and port, and the network of both.
BALANCER, NETWORK = "http://haproxy:8080", "homelab-inference"
# Where role prometheus finds Alertmanager, and that one the alert door on the control node (role healer).
ALERTMANAGER, DOOR_PORT = "alertmanager:9093", 9099
# The gateway's container, before which haproxy stands as well.
GATEWAY = "litellm"
DEFAULT_TIMEOUT_S = 8
READY_TIMEOUT_S = 900
# Where the controller keeps files of one node's library that another node needs: there is no way from node to node
# without a key.
CACHE = Path("~/.cache/homelab-inference/models")


def tier(node: dict[str, Any]) -> str:
    """Return the node's tier for health reports (declaration.md: node_tier)."""
    local = node.get("ansible_connection") == "local" or str(node.get("ansible_host", "")).startswith("127.")
    return str(node.get("node_tier") or ("local" if local else "remote")).upper()


def mirrored(image: str, mirror: str | None) -> str:
    """Return an image reference behind the lab's mirror; the whole upstream name stays part of the path."""
    return f"{mirror.removeprefix('http://')}/{image}" if mirror else image


def image(name: str, declaration: dict[str, Any], lock: dict[str, Any]) -> str:
    """Return the reference that a node pulls: behind the mirror, and by the digest where the plan knows it."""
    behind = mirrored(name, declaration["lab"].get("lab_registry_mirror"))
    return pinned(behind, lock["digests"].get(behind))


def image_variables(declaration: dict[str, Any]) -> list[str]:
    """Return the role variables whose images a lab needs."""
    services = declaration["lab"].get("lab_services", {})
    return [
        *IMAGE_VARIABLES,
        *(name for service, name in SERVICE_IMAGES.items() if "node" in services.get(service, {})),
    ]


def planned_images(declaration: dict[str, Any], images: dict[str, Any], instances: list[dict[str, Any]]) -> list[str]:
    """Return the images that a plan needs, behind the mirror."""
    names = [
        images["inference_node_images"][one["backend"]]
        for one in instances
        if one["backend"] in images["inference_node_images"]
    ]
    if "node" in declaration["lab"].get("lab_services", {}).get("litellm", {}):
        names += [images["haproxy_image"], images["litellm_image"]]
    names += [images[variable] for variable in image_variables(declaration) if variable in SERVICE_IMAGES.values()]
    return [mirrored(name, declaration["lab"].get("lab_registry_mirror")) for name in dict.fromkeys(names)]


def plain_http(mirror: str | None) -> list[str]:
    """Return the registry that engines have to be told to speak plain HTTP to, as a list of one or none."""
    return [mirror.removeprefix("http://").split("/")[0]] if mirror and mirror.startswith("http://") else []


def planner_nodes(
    declaration: dict[str, Any],
    facts: dict[str, dict[str, Any]],
    catalogue: dict[str, Any],
    overheads: dict[str, dict[str, int]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return what the planner has to know of each inference node. Declared values stand in where a host gave no facts.

    :param facts: per host that answered C({devices, memory_mib, cpus, library}).
    :param overheads: per host and card the MiB that servers were seen to take beside their buffers.
    """
    ports = lab_module.service_ports(declaration, catalogue)
    nodes = {}
    for host in declaration["groups"]["inference"]:
        node, found = declaration["nodes"][host], facts.get(host, {})
        devices = found.get("devices", node.get("node_gpus"))
        memory = found.get("memory_mib", node.get("node_memory_mib"))
        if devices is None or memory is None:
            continue
        nodes[host] = {
            "devices": devices,
            "memory_mib": memory,
            "memory_used_mib": found.get("memory_used_mib"),
            "cpus": found.get("cpus", node.get("node_cpus")),
            "runtime": node.get("node_runtime", "docker"),
            "presence": node.get("node_presence", "always"),
            "library": found.get("library", []),
            "ports": sorted(ports.get(host, {})),
            "reservations": _reserved(declaration, host),
        }
        if (overheads or {}).get(host):
            nodes[host]["overheads"] = overheads[host]
    return nodes


def _reserved(declaration: dict[str, Any], host: str) -> dict[str, int]:
    reserved: dict[str, int] = {}
    for entry in declaration["lab"].get("lab_reservations", {}).get(host, []):
        where = entry.get("device", "host")
        reserved[where] = reserved.get(where, 0) + lab_module.mib(entry["memory"])
    return reserved


def planned_memory(instances: list[dict[str, Any]], host: str, running: list[str]) -> dict[str, int]:
    """Return the MiB that servers which run on a host were planned with, by device id and C(host).

    :param running: names of containers, of which ours are called llamacpp-NAME.
    """
    planned: dict[str, int] = {}
    for members in servers([one for one in instances if one["node"] == host]):
        if f"llamacpp-{server_name(members[0])}" in running:
            for where in dict.fromkeys(where for one in members for where in one["memory"]):
                most = max(one["memory"].get(where, 0) for one in members)
                planned[where] = planned.get(where, 0) + most
    return planned


def awake(instances: list[dict[str, Any]], host: str, running: list[str]) -> set[str]:
    """Return the devices of a host, and C(host), of which a server takes now more, now less: models take turns."""
    return {
        where
        for members in servers([one for one in instances if one["node"] == host])
        if len(members) > 1 and f"llamacpp-{server_name(members[0])}" in running
        for one in members
        for where in one["memory"]
    }


def declared(declaration: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the declaration that a plan is made from; a lock that keeps another one is out of date."""
    lab = declaration["lab"]
    return {
        "inference": declaration["groups"]["inference"],
        "models": lab.get("lab_models", {}),
        "services": lab.get("lab_services", {}),
        "reservations": lab.get("lab_reservations", {}),
    }


def chosen(instance: dict[str, Any], lock: dict[str, Any]) -> dict[str, Any]:
    """Return the files and shape that a server runs: those of its model, or of the variant that the plan chose."""
    model = lock["models"][instance["model"]]
    return model["variants"][instance["variant"]] if "variants" in model else model


def server_view(members: list[dict[str, Any]], declaration: dict[str, Any], lock: dict[str, Any]) -> dict[str, Any]:
    """Return one server as role inference_node takes it: with its model, or with several that take turns."""
    instance = members[0]
    host = instance["node"]
    node = declaration["nodes"][host]
    devices = {device["id"]: device for device in lock["nodes"][host]["devices"]}
    if len(members) == 1:
        served = model_view(instance, lock)
    else:
        found = [model_view(one, lock, alone=False) for one in members]
        of_files = ("volume", "library", "files")
        served = {
            "models": [
                {"alias": one["model"], **{key: one[key] for key in one if key not in ("model", "library", "files")}}
                for one in found
            ],
            "volumes": [{key: one[key] for key in of_files} for one in found],
        }
    return {
        "name": server_name(instance),
        **served,
        "backend": instance["backend"],
        "image": image(lock["images"]["inference_node_images"][instance["backend"]], declaration, lock),
        "devices": [devices[name] for name in instance["devices"]],
        "port": instance["port"],
        "address": lab_module.address(node, host),
        "published_address": "0.0.0.0",
        "memory_mib": None,
        "cpus": None,
        "ready_timeout": READY_TIMEOUT_S,
    }


def model_view(instance: dict[str, Any], lock: dict[str, Any], alone: bool = True) -> dict[str, Any]:
    """Return one model of a server: its name, its files, its options.

    :param alone: its volume is the only one of its container; where there are several each has a directory.
    """
    model, library = chosen(instance, lock), instance["library"]
    volume = f"model-{instance['model']}"
    if library:
        volume = "library-" + re.sub(r"[^a-zA-Z0-9_.-]+", "-", library["library"]).strip("-")
    root = "/models" if alone else f"/models/{volume}"
    return {
        "model": instance["model"],
        "mode": instance["mode"],
        "server_options": {**_under(root, instance["server_options"]), **projector(model, library, root)},
        "volume": volume,
        "model_file": library["path"] if library else model["files"][0]["name"],
        "library": library["library"] if library else None,
        "files": [] if library else [transfer(file) for file in model["files"]],
    }


def _under(root: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose paths in C(/models), a model's own volume, lie where that volume is mounted."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return re.sub("^/models/", f"{root}/", value) if isinstance(value, str) else value

    return {name: moved(value) for name, value in options.items()}


def projector(model: dict[str, Any], library: dict[str, str] | None, root: str = "/models") -> dict[str, str]:
    """Return the option for a model's multimodal projector, which lies beside the model in its volume."""
    if not model.get("mmproj"):
        return {}
    beside = PurePosixPath(root, library["path"]).parent if library else PurePosixPath(root)
    return {"mmproj": str(beside / model["mmproj"])}


def cached(file: dict[str, Any]) -> str:
    """Return where the controller keeps a library file on its way to another node."""
    return str(CACHE.expanduser() / f"{file['size']}-{file['name']}")


def transfer(file: dict[str, Any]) -> dict[str, Any]:
    """Return a file as module model_volume takes it; one that lies on another node comes by way of the controller."""
    known = {
        key: file[key] for key in ("name", "size", "sha256", "url", "controller_path") if file.get(key) is not None
    }
    return {**known, "controller_path": cached(file)} if "host" in file else known


def hands_over(lock: dict[str, Any], host: str) -> list[dict[str, str]]:
    """Return the library files of a host that other nodes need, as C({path, cache})."""
    needed = [
        file for instance in lock["instances"] if not instance["library"] for file in chosen(instance, lock)["files"]
    ]
    return [
        dict(entry)
        for entry in dict.fromkeys(
            (("path", file["path"]), ("cache", cached(file))) for file in needed if file.get("host") == host
        )
    ]


def started(declaration: dict[str, Any], lock: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the planned servers that this version starts: those on nodes with Docker."""
    nodes = declaration["nodes"]
    return [one for one in lock["instances"] if nodes[one["node"]].get("node_runtime", "docker") == "docker"]


def _on(host: str, declaration: dict[str, Any], lock: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in started(declaration, lock) if one["node"] == host]


def _balanced(declaration: dict[str, Any], lock: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each model with its servers, as role haproxy takes them. Models that take turns have the same server."""
    found: dict[str, list[dict[str, Any]]] = {}
    for members in servers(started(declaration, lock)):
        host = members[0]["node"]
        server = {
            "name": server_name(members[0]),
            "address": lab_module.address(declaration["nodes"][host], host),
            "port": members[0]["port"],
        }
        for one in members:
            found.setdefault(one["model"], []).append(server)
    return [{"name": name, "servers": behind} for name, behind in found.items()]


def _llamacpp(declaration: dict[str, Any], lock: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the gateway's deployments of llama-server: one for each model, whose servers haproxy knows."""
    modes = {one["model"]: one["mode"] for one in started(declaration, lock)}
    for model in _balanced(declaration, lock):
        yield {
            "name": model["name"],
            "engine": "llamacpp",
            "model": model["name"],
            "api_base": f"{BALANCER}/{model['name']}",
            "mode": modes[model["name"]],
            "api_key_env": "LLAMACPP_API_KEY",
            "id": model["name"],
        }


def _ollama(declaration: dict[str, Any], catalogue: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the gateway's deployments of Ollama, one per node on which the model is declared."""
    port = catalogue["ollama"]["ports"]["http"]
    for name, model in lab_module.models(declaration).items():
        if model["engine"] == "ollama":
            for host in model["nodes"] or declaration["groups"]["inference"]:
                yield {
                    "name": name,
                    "engine": "ollama",
                    "model": model["source"]["ollama"],
                    "api_base": f"http://{lab_module.address(declaration['nodes'][host], host)}:{port}",
                    "mode": model["mode"],
                    "api_key_env": None,
                    "id": f"{name}-{host}",
                }


def gateway(declaration: dict[str, Any], lock: dict[str, Any], catalogue: dict[str, Any]) -> dict[str, Any] | None:
    """Return the gateway as role litellm takes it, and where it answers; None where the lab has none of its own."""
    entry = declaration["lab"].get("lab_services", {}).get("litellm", {})
    if "node" not in entry:
        return None
    host = entry["node"]
    registry = lab_module.models(declaration)
    deployments = [*_llamacpp(declaration, lock), *_ollama(declaration, catalogue)]
    served = {deployment["name"] for deployment in deployments}
    order = lab_module.category_order({name: model for name, model in registry.items() if name in served})
    chains = lab_module.fallbacks(registry)
    fallbacks = {
        name: [other for other in others if other in served] for name, others in chains.items() if name in served
    }
    return {
        "host": host,
        "address": lab_module.address(declaration["nodes"][host], host),
        "port": {**catalogue["litellm"]["ports"], **entry.get("ports", {})}["http"],
        "image": image(lock["images"]["litellm_image"], declaration, lock),
        "container": GATEWAY,
        "network": NETWORK,
        "deployments": deployments,
        "fallbacks": {name: others for name, others in fallbacks.items() if others},
        "aliases": {category: names[0] for category, names in order.items() if category not in served},
    }


def balancer(declaration: dict[str, Any], lock: dict[str, Any], resting: Collection[str] = ()) -> dict[str, Any]:
    """Return what stands between the gateway and its model servers, as role haproxy takes it.

    :param resting: hosts in maintenance.
    """
    return {
        "image": image(lock["images"]["haproxy_image"], declaration, lock),
        "network": NETWORK,
        "models": _balanced(declaration, lock),
        "drained": sorted(
            server_name(members[0]) for members in servers(started(declaration, lock)) if members[0]["node"] in resting
        ),
    }


def _endpoint(
    declaration: dict[str, Any],
    name: str,
    where: str,
    url: str,
    kind: str,
    mode: str = "chat",
    may_be_away: bool = False,
) -> dict[str, Any]:
    tiers = {key.upper(): entry for key, entry in declaration["lab"].get("lab_tiers", {}).items()}
    return {
        "name": f"{where.lower()}/{name}",
        "url": url,
        "tier": where,
        "timeout": tiers.get(where, {}).get("timeout", DEFAULT_TIMEOUT_S),
        "kind": kind,
        "mode": mode,
        "may_be_away": may_be_away,
    }


def guests(declaration: dict[str, Any]) -> list[str]:
    """Return the hosts that may be off, or busy with something else (declaration.md: node_presence)."""
    return [host for host, node in declaration["nodes"].items() if node.get("node_presence") == "guest"]


def model_servers(
    declaration: dict[str, Any], lock: dict[str, Any], resting: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return each model server: its name, host and unit, when it starts there, its models, GPUs and endpoint.

    :param resting: hosts in maintenance.
    """
    excused = {*guests(declaration), *resting}
    found = []
    for members in servers(started(declaration, lock)):
        first, name, host = members[0], server_name(members[0]), members[0]["node"]
        node = declaration["nodes"][host]
        url = f"http://{lab_module.address(node, host)}:{first['port']}"
        mode = TURNS if len(members) > 1 else first["mode"]
        found.append(
            {
                "name": name,
                "host": host,
                "unit": f"llamacpp-{name}.service",
                "start": min(one["start"] for one in members),
                "models": [one["model"] for one in members],
                "gpus": sorted({device for one in members for device in one["devices"]}),
                "endpoint": _endpoint(
                    declaration, name, tier(node), url, "llamacpp", mode, may_be_away=host in excused
                ),
            }
        )
    return found


def endpoints(
    declaration: dict[str, Any], lock: dict[str, Any], catalogue: dict[str, Any], resting: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return everything whose health is asked for, in the shape of module health_probe."""
    found = [server["endpoint"] for server in model_servers(declaration, lock, resting)]
    entry = gateway(declaration, lock, catalogue)
    if entry:
        url = f"http://{entry['address']}:{entry['port']}"
        found.append(_endpoint(declaration, "litellm", "GATEWAY", url, "litellm"))
    return found


def views(
    declaration: dict[str, Any],
    lock: dict[str, Any] | None,
    catalogue: dict[str, Any],
    resting: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return per host C({roles: [...], docker_host: {...}, inference_node: {...}, litellm: {...}}).

    Without a lock only what the declaration alone says is there: which roles a host has.

    :param resting: hosts in maintenance.
    """
    services = declaration["lab"].get("lab_services", {})
    watched, healed_from = "node" in services.get("prometheus", {}), lab_module.door_host(declaration)
    mirror = declaration["lab"].get("lab_registry_mirror")
    gate = gateway(declaration, lock, catalogue) if lock else None
    result: dict[str, dict[str, Any]] = {}
    for host, node in declaration["nodes"].items():
        docker = node.get("node_runtime", "docker") == "docker"
        roles = [
            catalogue[name]["role"]
            for name, entry in services.items()
            if entry.get("node") == host and catalogue[name].get("role")
        ]
        if host in declaration["groups"]["inference"] and docker:
            roles.append("inference_node")
        if "litellm" in roles:
            roles.append("haproxy")
        if roles:
            roles.insert(0, "docker_host")
            if watched:
                roles.append("node_exporter")
        if host == healed_from:
            roles += ["controller", "healer"]
        instances = (
            [server_view(members, declaration, lock) for members in servers(_on(host, declaration, lock))]
            if lock
            else []
        )
        result[host] = {
            "roles": roles,
            "hands_over": hands_over(lock, host) if lock else [],
            "tier": tier(node),
            "address": lab_module.address(node, host),
            "library": node.get("node_library", []),
            "docker_host": {"insecure_registries": plain_http(mirror)},
            "inference_node": {"instances": instances},
            "containers": [
                {"name": f"llamacpp-{one['name']}", "devices": [device["id"] for device in one["devices"]]}
                for one in instances
                if "models" not in one  # which of them is awake changes by the minute
            ],
            "haproxy": balancer(declaration, lock, resting) if lock and gate and gate["host"] == host else None,
            "litellm": gate if gate and gate["host"] == host else None,
        }
    if lock:
        _watch(result, declaration, lock, gate, healed_from)
    return result


def _watch(
    result: dict[str, dict[str, Any]],
    declaration: dict[str, Any],
    lock: dict[str, Any],
    gate: dict[str, Any] | None,
    door: str | None,
) -> None:
    """Add what roles prometheus, alertmanager and healer take, to the views of the hosts that have them."""
    services = declaration["lab"].get("lab_services", {})
    nodes = [host for host, view in result.items() if "node_exporter" in view["roles"]]
    for host, view in result.items():
        if "prometheus" in view["roles"]:
            near = gate["host"] if gate and gate["host"] == host else None
            view["prometheus"] = {
                "image": image(lock["images"]["prometheus_image"], declaration, lock),
                "network": NETWORK,
                "scrape_configs": alerts.scrape_configs(
                    {node: result[node]["address"] for node in nodes}, "haproxy:8080" if near else None, near
                ),
                "rule_groups": alerts.rule_groups(
                    [
                        {"name": one["name"], "host": one["host"], "ready_timeout": READY_TIMEOUT_S}
                        for one in model_servers(declaration, lock)
                    ],
                    nodes,
                    guests(declaration),
                    near,
                ),
                "alertmanagers": [ALERTMANAGER] if "node" in services.get("alertmanager", {}) else [],
            }
        if "alertmanager" in view["roles"]:
            view["alertmanager"] = {
                "image": image(lock["images"]["alertmanager_image"], declaration, lock),
                "network": NETWORK,
                "door": f"http://{result[door]['address']}:{DOOR_PORT}/hooks/recover" if door else None,
            }
        if host == door:
            view["healer"] = {"nodes": nodes, "address": view["address"], "port": DOOR_PORT}


def rolling(derived: dict[str, dict[str, Any]], slices: dict[str, dict[str, Any]]) -> list[str]:
    """Return the hosts on which servers that run are changed or leave, which is done one host at a time.

    :param slices: per host the slice that it keeps from the last run.
    """
    return [
        host
        for host, names in owed(derived, slices).items()
        if any(one["name"] in names for one in slices[host].get("instances", []))
    ]


def owed(derived: dict[str, dict[str, Any]], slices: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return per host the servers that it does not have as they are planned now, or has no longer to have.

    :param slices: per host that was asked the slice that it keeps from the last run.
    """
    found = {}
    for host, kept in slices.items():
        wanted = {one["name"]: one for one in derived[host]["inference_node"]["instances"]}
        held = {one["name"]: one for one in kept.get("instances", [])}
        names = sorted(
            name
            for name in {*wanted, *held}
            if name not in wanted
            or name not in held
            or any(held[name].get(key) != value for key, value in wanted[name].items())
        )
        if names:
            found[host] = names
    return found


def given_up(
    derived: dict[str, dict[str, Any]],
    servers_: list[dict[str, Any]],
    slices: dict[str, dict[str, Any]],
    leaves: dict[str, list[str]],
    up: Collection[str],
    gateways_up: Collection[str],
) -> list[str]:
    """Return what would be served by nobody if a run went on, a sentence each.

    :param servers_: what model_servers() returned.
    :param slices: per host that was asked the slice that it keeps from the last run.
    :param leaves: what goes_away() returned.
    :param up: hosts that have, or will have by rolling, the servers that are planned there.
    :param gateways_up: hosts whose gateway is as planned, or can be told.
    """
    homes: dict[str, set[str]] = {}
    for server in servers_:
        for model in server["models"]:
            homes.setdefault(model, set()).add(server["host"])
    served: dict[str, list[str]] = {}
    for host, kept in slices.items():
        for one in kept.get("instances", []):
            for model in [other["alias"] for other in one.get("models") or []] or [one.get("model") or one["name"]]:
                served.setdefault(model, []).append(host)
    found = [
        f"{model} is served by {', '.join(served[model])} and planned for {', '.join(sorted(hosts))}, without it so far"
        for model, hosts in homes.items()
        if model in served and not hosts & set(up) and not hosts & set(served[model])
    ]
    for host, view in derived.items():
        if view["haproxy"] and host not in gateways_up and leaves:
            found.append(f"the gateway on {host} cannot be told that {', '.join(sorted(leaves))} changes")
    return found


def goes_away(derived: dict[str, dict[str, Any]], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return per host the names of what we made there and the lab no longer wants.

    :param found: per host the names of model servers (llamacpp-NAME) and services of ours that are there.
    """
    gone = {}
    for host, names in found.items():
        stays = {f"llamacpp-{instance['name']}" for instance in derived[host]["inference_node"]["instances"]} | set(
            derived[host]["roles"]
        )
        left = [name for name in names if name not in stays]
        if left:
            gone[host] = left
    return gone
