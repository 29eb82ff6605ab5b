# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lock: the file that holds the plan. Read, render, hold against the declaration.

Format (version 1), all sizes in MiB unless the name says bytes::

    lock_version: 1
    declared:   what the plan was made for (models, services, reservations, nodes in use), to see when it is out of date
    nodes:      HOST: {devices, memory_mib, cpus, runtime, presence, library}: the facts the plan was made from
    models:     MODEL: {commit, quant, files: [{name, size, sha256, url | controller_path | library}], shape}
    images:     VARIABLE: {name: reference} or reference
    digests:    IMAGE behind the mirror: digest, or null where its registry told none
    instances:  [{name, model, node, backend, devices, port, server_options, memory, parts, start, ...}]
    refused:    [{model, reason, node, device, needed_mib, available_mib, deficit_mib, change}]
    order:      HOST: [names] in which servers start
    devices:    HOST: DEVICE or host: {size_mib, reserved_mib, others_mib, planned_mib, left_mib}
    survival:   [{lost, keeps, loses, sentence}] per node and card
    value:      sum of priority x quality
    inputs:     digest of all that the plan was made from
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

VERSION = 1
HEADER = """\
---
# The lock: which model runs where, with which flags. Written by plan.yml, applied by site.yml; keep it in git.
# To change it, change the declaration and run plan.yml. To go back: git checkout this file, then run site.yml.
"""


def beside(path: Path, suffix: str) -> Path:
    """Return what is kept beside a lock: for C(.lab.lock.yml) and C(.running) C(.lab.running)."""
    return path.with_name(path.name.removesuffix(".lock.yml") + suffix)


class LockError(Exception):
    """The lock cannot be used; the message says why and what to do."""


class _Dumper(yaml.SafeDumper):
    """Block style without aliases, so that a diff of two locks reads line by line."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists below their key, as yamllint wants them."""
        return super().increase_indent(flow, False)


class _Line(dict):  # type: ignore[type-arg]
    """A mapping that is written on one line."""


def _numbers(dumper: _Dumper, value: list[Any]) -> yaml.Node:
    """Write numbers, of which a shape has one per layer, on as few lines as there is room for."""
    flow = bool(value) and all(isinstance(item, (int, float)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


_Dumper.add_representer(list, _numbers)
_Dumper.add_representer(
    _Line, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=True)
)


def render(lock: dict[str, Any]) -> str:
    """Return the lock as text: the same lock gives the same bytes."""
    instances = [
        {**one, "parts": [_Line(part) for part in one["parts"]]} if "parts" in one else one
        for one in lock.get("instances", [])
    ]
    return HEADER + yaml.dump(
        {**lock, "instances": instances} if "instances" in lock else lock,
        Dumper=_Dumper,
        sort_keys=False,
        width=120,
        allow_unicode=True,
        default_flow_style=False,
    )


def parse(text: str, path: str) -> dict[str, Any]:
    """Return the lock in C(text); C(path) is named in the errors.

    :raises LockError: the text is no lock, or one of another version.
    """
    try:
        lock = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LockError(
            f"Cannot read the lock {path}: {' '.join(str(error).split())}. "
            "Restore it from git, or delete it and run plan.yml."
        ) from error
    if not isinstance(lock, dict) or "lock_version" not in lock:
        raise LockError(f"{path} is not a lock. Restore it from git, or delete it and run plan.yml.")
    if lock["lock_version"] != VERSION:
        raise LockError(
            f"The lock {path} has version {lock['lock_version']}, this collection writes version {VERSION}. "
            "Use the collection that wrote it, or delete it and run plan.yml."
        )
    return lock


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Say, leaf by leaf, how two values differ: one sentence each, C(PATH was X, is Y)."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in [*before, *(key for key in after if key not in before)]:
            place = f"{where}.{key}".removeprefix(".")
            if key not in before:
                found.append(f"{place} is new")
            elif key not in after:
                found.append(f"{place} is gone")
            else:
                found += differences(before[key], after[key], place)
        return found
    return [] if before == after else [f"{where} was {before!r}, is {after!r}"]
