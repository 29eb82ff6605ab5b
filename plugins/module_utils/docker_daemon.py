# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Docker's daemon.json should hold: our keys beside the ones of the machine's owner, which are never touched.

A record says which values are ours. Every change starts by taking those back, so that what is left is the owner's;
then ours are put beside it. A value that somebody changed by hand is no longer the recorded one: it counts as theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# What a running engine takes over when it is told to read its file again, as long as the key is still in the file.
RELOADABLE = frozenset(
    {
        "allow-nondistributable-artifacts",
        "authorization-plugins",
        "debug",
        "default-runtime",
        "insecure-registries",
        "labels",
        "live-restore",
        "max-concurrent-downloads",
        "max-concurrent-uploads",
        "max-download-attempts",
        "registry-mirrors",
        "runtimes",
        "shutdown-timeout",
    }
)

Json = dict[str, Any]


class DockerDaemonError(Exception):
    """daemon.json cannot be worked with."""


@dataclass
class Merged:
    """The file as it should be, which of it is ours, and what the owner decided otherwise."""

    config: Json
    settings: Json = field(default_factory=dict)
    additions: Json = field(default_factory=dict)
    kept: list[dict[str, str]] = field(default_factory=list)


def parse(text: str, path: str) -> Json:
    """The object in daemon.json; an empty file is an empty object, as it is for Docker."""
    if not text.strip():
        return {}
    try:
        config = json.loads(text)
    except ValueError as exc:
        raise DockerDaemonError(
            f"Reading {path} failed: it is not valid JSON ({exc}). Repair it or move it away; nothing was changed."
        ) from exc
    if not isinstance(config, dict):
        raise DockerDaemonError(
            f"Reading {path} failed: it holds no JSON object. Repair it or move it away; nothing was changed."
        )
    return config


def render(config: Json, like: str) -> str:
    """The text of daemon.json, indented as the file was."""
    first = like.partition('"')[0].rpartition("\n")[2] if like.lstrip().startswith("{") else ""
    indent: str | int = first if first and first.isspace() else 2
    return json.dumps(config, indent=indent, ensure_ascii=False) + "\n"


def take_back(config: Json, settings: Json, additions: Json) -> Json:
    """The file without what is recorded as ours and still has our value."""
    rest = dict(config)
    for key, value in settings.items():
        if key in rest and rest[key] == value:
            del rest[key]
    for key, ours in additions.items():
        theirs = rest.get(key)
        if isinstance(theirs, list) and isinstance(ours, list):
            rest[key] = [item for item in theirs if item not in ours]
        elif isinstance(theirs, dict) and isinstance(ours, dict):
            rest[key] = {name: item for name, item in theirs.items() if name not in ours or item != ours[name]}
        else:
            continue
        if not rest[key] and theirs:
            del rest[key]
    return rest


def merge(current: Json, recorded: Json, settings: Json, additions: Json, flags: Iterable[str] = ()) -> Merged:
    """current with settings (whole values) and additions (list items, dict entries) beside the owner's keys.

    recorded is what an earlier run noted as ours, flags are the keys that the engine is given on its command line:
    it refuses to start when the file has them too.
    """
    owners = take_back(current, recorded.get("settings", {}), recorded.get("additions", {}))
    given = set(flags)
    merged = Merged(config=dict(owners))

    def keep(key: str, wanted: Any, why: str) -> None:
        merged.kept.append({"key": key, "wanted": _text(wanted), "why": why})

    for key, value in settings.items():
        if key in given:
            keep(key, value, "the engine is given it on its command line")
        elif key in owners:
            if owners[key] != value:
                keep(key, value, f"it is set to {_text(owners[key])}")
        else:
            merged.config[key] = merged.settings[key] = value
    _drop_foreign_log_opts(merged, owners, settings, given)

    for key, wanted in additions.items():
        if not wanted:
            continue
        if key in given:
            keep(key, wanted, "the engine is given it on its command line")
        elif not isinstance(owners.get(key, wanted), type(wanted)):
            keep(key, wanted, f"it is set to {_text(owners[key])}")
        elif isinstance(wanted, dict):
            _add_entries(merged, key, owners.get(key, {}), wanted)
        else:
            _add_items(merged, key, owners.get(key, []), wanted)
    merged.config = _in_order_of(current, merged.config)
    return merged


def changed_keys(before: Json, after: Json) -> list[str]:
    """The keys whose values differ."""
    return sorted(
        key for key in {*before, *after} if before.get(key) != after.get(key) or (key in before) != (key in after)
    )


def needs_restart(keys: Iterable[str], after: Json) -> list[str]:
    """Those of the changed keys that a running engine does not take over; a key that went away is one of them."""
    return sorted(key for key in keys if key not in RELOADABLE or key not in after)


def keys_in_flags(argv: Iterable[str]) -> set[str]:
    """The keys of daemon.json that stand on the engine's command line, where lists are given item by item."""
    plurals = {"insecure-registry": "insecure-registries", "registry-mirror": "registry-mirrors"}
    keys = set()
    for arg in argv:
        if arg.startswith("--"):
            name = arg[2:].partition("=")[0]
            keys |= {name, plurals.get(name, f"{name}s")}
    return keys


def _drop_foreign_log_opts(merged: Merged, owners: Json, settings: Json, given: set[str]) -> None:
    """Options for one log driver make another refuse to start containers."""
    driver = settings.get("log-driver")
    if "log-opts" not in merged.settings or driver is None:
        return
    if "log-driver" in given or owners.get("log-driver", driver) != driver:
        del merged.config["log-opts"]
        merged.kept.append(
            {
                "key": "log-opts",
                "wanted": _text(merged.settings.pop("log-opts")),
                "why": "they belong to another log driver",
            }
        )


def _add_items(merged: Merged, key: str, owners: list[Any], wanted: list[Any]) -> None:
    # NAME=VALUE items, as in exec-opts, contradict an item of the owner's with the same name.
    names = {item.partition("=")[0]: item for item in owners if isinstance(item, str) and "=" in item}
    ours = []
    for item in wanted:
        name = item.partition("=")[0] if isinstance(item, str) and "=" in item else None
        if item in owners or item in ours:
            continue
        if name in names:
            merged.kept.append({"key": key, "wanted": item, "why": f"it has {names[name]}"})
        else:
            ours.append(item)
    if ours:
        merged.additions[key] = ours
        merged.config[key] = [*owners, *ours]


def _add_entries(merged: Merged, key: str, owners: Json, wanted: Json) -> None:
    ours = {}
    for name, value in wanted.items():
        if name not in owners:
            ours[name] = value
        elif owners[name] != value:
            merged.kept.append(
                {"key": f"{key}.{name}", "wanted": _text(value), "why": f"it is set to {_text(owners[name])}"}
            )
    if ours:
        merged.additions[key] = ours
        merged.config[key] = {**owners, **ours}


def _in_order_of(model: Any, value: Any) -> Any:
    """value, its keys and items in the order that model has them, so that only what changed moves."""
    if isinstance(model, dict) and isinstance(value, dict):
        keys = [key for key in model if key in value] + [key for key in value if key not in model]
        return {key: _in_order_of(model.get(key), value[key]) for key in keys}
    if isinstance(model, list) and isinstance(value, list):
        return [item for item in model if item in value] + [item for item in value if item not in model]
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
