# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""In which order model servers are taken out of service, one at a time, and when that would be an outage."""

from __future__ import annotations

from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.probe import SERVING


class RollingError(Exception):
    """What was asked for cannot be done; the message says what to do."""


def order(servers: list[dict[str, Any]], names: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the servers in the order in which they are restarted.

    That of the plan goes round the hosts: the first server of each, then the second ones, so that the replicas of a
    model, which are on different hosts and start early there, are far from each other's turn.

    :param servers: C({name, host, start, models, ...}), see C(views.model_servers).
    :param names: those to be restarted, in this order; all of them where none are given.
    :raises RollingError: a name that no server has, or one twice.
    """
    by_name = {server["name"]: server for server in servers}
    if not names:
        return sorted(servers, key=lambda server: (server["start"], server["host"]))
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise RollingError(
            f"There is no model server {', '.join(unknown)}. The lab has: {', '.join(sorted(by_name)) or 'none'}."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RollingError(f"{', '.join(twice)} is named twice in the order. Name each server once.")
    return [by_name[name] for name in names]


def refusals(
    chosen: list[dict[str, Any]],
    servers: list[dict[str, Any]],
    states: dict[str, str],
    gpu_problems: dict[str, list[dict[str, str]]],
) -> list[str]:
    """Say why a restart would be an outage, a sentence each; nothing where it would not.

    :param chosen: the servers to be restarted.
    :param servers: all servers of the lab.
    :param states: state of each server by name, as module health_probe has it.
    :param gpu_problems: per host that answered what gpu_facts found.
    """
    found = []
    for host in dict.fromkeys(server["host"] for server in chosen):
        if host not in gpu_problems:
            found.append(f"{host} was not reached. Switch it on, or name the servers of the others in lab_restart.")
    for host in dict.fromkeys(server["host"] for server in chosen if server["gpus"]):
        for problem in gpu_problems.get(host, []):
            found.append(
                f"{host}: a server that is stopped there would not start again ({problem['evidence']}). "
                f"{problem['remedy']}"
            )
    for server in chosen:
        if states.get(server["name"]) not in SERVING:
            continue  # it serves nobody as it is
        for model in server["models"]:
            others = [one["name"] for one in servers if model in one["models"] and one["name"] != server["name"]]
            ill = [name for name in others if states.get(name) not in SERVING]
            if others and len(ill) == len(others):
                found.append(
                    f"{server['name']} on {server['host']} is the only one that answers for {model}: "
                    f"{', '.join(f'{name} is {states.get(name)}' for name in ill)}. Repair that one first."
                )
    return found
