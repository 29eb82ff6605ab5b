# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab that does not exist yet: the nodes without some of them, and with hardware that somebody might buy."""

from __future__ import annotations

import re
from typing import Any

import yaml
from ansible_collections.homelab.inference.plugins.module_utils.planner.room import VENDOR_BACKENDS
from ansible_collections.homelab.inference.plugins.plugin_utils.lab import mib
from ansible_collections.homelab.inference.plugins.plugin_utils.schema import nearest

SIZE = re.compile(r"^[0-9.]+(MiB|GiB|MB|GB)$")
PLUS_KEYS = ("node", "memory", "vendor", "name", "unified", "main_memory")
PLUS_HELP = "Write plus=NODE:32GiB, or for more detail plus='{node: forge, memory: 32GiB, vendor: nvidia}'"


def listed(value: Any) -> list[Any]:
    """Return a word of the command line as a list: one value, several with commas between them, or a list."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def change(
    nodes: dict[str, dict[str, Any]], hosts: list[str], without: Any, plus: Any
) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """Return C((nodes, changes, problems)): the nodes as they would be, what is different, and what is wrong.

    :param hosts: all inference nodes, also those of which nothing is known.
    :param without: nodes, or cards as C(NODE:gpu0).
    :param plus: cards as C(NODE:SIZE), or with the keys of PLUS_KEYS; a node that is not there is a new machine.
    """
    nodes = dict(nodes)
    changes: list[str] = []
    problems: list[str] = []
    for word in listed(without):
        sentence = _without(nodes, hosts, str(word), changes)
        problems += [sentence] if sentence else []
    for entry in _entries(plus, problems):
        sentence = _plus(nodes, entry, changes)
        problems += [sentence] if sentence else []
    return nodes, changes, problems


def _without(nodes: dict[str, dict[str, Any]], hosts: list[str], word: str, changes: list[str]) -> str:
    host, _colon, card = word.partition(":")
    if host not in nodes:
        if host in hosts:
            changes.append(f"without {host}")
            return ""
        return f"without names {host!r}, which is no inference node{nearest(host, hosts)}."
    if not card:
        del nodes[host]
        changes.append(f"without {host}")
        return ""
    left = [device for device in nodes[host]["devices"] if device["id"] != card]
    if len(left) == len(nodes[host]["devices"]):
        known = ", ".join(device["id"] for device in left) or "none"
        return f"without names {card} of {host}, which has {known}."
    nodes[host] = {**nodes[host], "devices": left}
    changes.append(f"without {card} of {host}")
    return ""


def _entries(plus: Any, problems: list[str]) -> list[dict[str, Any]]:
    """Return what C(plus) says as dictionaries, whichever way it was written."""
    if isinstance(plus, str) and plus.strip().startswith(("{", "[")):
        try:
            plus = yaml.safe_load(plus)
        except yaml.YAMLError:
            problems.append(
                f"plus is {plus!r}, which breaks off; in KEY=VALUE a blank ends the value, so write it without blanks, "
                "or the whole as -e '{\"plus\": {…}}'."
            )
            return []
    if isinstance(plus, dict):
        plus = [plus]
    found = []
    for entry in listed(plus):
        if isinstance(entry, str):
            host, _colon, size = entry.rpartition(":")
            entry = {"node": host, "memory": size}
        if not isinstance(entry, dict) or not entry.get("node") or not SIZE.match(str(entry.get("memory"))):
            problems.append(f"plus does not say a node and a size such as 32GiB. {PLUS_HELP}.")
            continue
        unknown = [key for key in entry if key not in PLUS_KEYS]
        if unknown:
            problems.append(f"plus has no key {unknown[0]}{nearest(unknown[0], PLUS_KEYS)}. {PLUS_HELP}.")
            continue
        found.append(entry)
    return found


def _plus(nodes: dict[str, dict[str, Any]], entry: dict[str, Any], changes: list[str]) -> str:
    host = str(entry["node"])
    old = nodes.get(host)
    size = mib(str(entry["memory"]))
    if old is None and not SIZE.match(str(entry.get("main_memory") or "")):
        return (
            f"plus names {host}, which is none of {', '.join(nodes) or 'the known nodes'}; "
            "for a new machine say its main memory too: main_memory: 64GiB."
        )
    known = [device["vendor"] for device in old["devices"]] if old else []
    vendor = str(entry.get("vendor") or (known[0] if known else "nvidia"))
    if vendor not in VENDOR_BACKENDS:
        return f"plus has vendor {vendor!r}; known are {', '.join(VENDOR_BACKENDS)}."
    unified = bool(entry.get("unified"))
    devices = list(old["devices"]) if old else []
    taken = {device["id"] for device in devices}
    number = next(number for number in range(len(taken) + 1) if f"gpu{number}" not in taken)
    card = {
        "id": f"gpu{number}",
        "vendor": vendor,
        "name": str(entry.get("name") or f"a card of {entry['memory']}"),
        "memory_mib": size,
        "memory_kind": "unified" if unified else "dedicated",
        "cap_mib": None,
    }
    machine = old or {
        "devices": [],
        "memory_mib": mib(str(entry.get("main_memory") or "0MiB")),
        "cpus": None,
        "runtime": "docker",
        "presence": "always",
        "library": [],
        "ports": [],
        "reservations": {},
    }
    nodes[host] = {**machine, "devices": [*devices, card]}
    changes.append(f"with {card['name']} as {card['id']} of {host}" + ("" if old else ", a new machine"))
    return ""
