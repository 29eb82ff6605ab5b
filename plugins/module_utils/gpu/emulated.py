# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Emulated GPUs: llama.cpp RPC servers that a file on the node lists. The box is tried out on them."""

from __future__ import annotations

import json

from ansible_collections.homelab.inference.plugins.module_utils.gpu.device import Found, device, problem
from ansible_collections.homelab.inference.plugins.module_utils.gpu.host import Host

LIST = "/etc/homelab-inference/emulated-gpus.json"


class EmulatedListError(Exception):
    """The list of emulated GPUs cannot be used."""


def collect(host: Host) -> Found:
    """All emulated devices of this machine, in the order of the list."""
    devices, problems = [], []
    text = host.read(LIST)
    try:
        for entry in json.loads(text) if text else []:
            name, endpoint = entry["name"], entry["endpoint"]
            found = device("emulated", name, int(entry["memory_mib"]), uuid=entry["uuid"], endpoint=endpoint)
            refusal = host.connect(endpoint)
            if refusal is None:
                devices.append(found)
            else:
                evidence = f"{name} does not answer on {endpoint}: {refusal}"
                problems.append(problem("emulated", "lost", evidence, "Start its RPC server."))
    except (ValueError, KeyError, TypeError) as exc:
        raise EmulatedListError(
            f"Reading {LIST} failed: {type(exc).__name__} {exc}. "
            "Make it a JSON list of objects with name, uuid, endpoint and memory_mib."
        ) from exc
    return Found(devices, problems, {})
