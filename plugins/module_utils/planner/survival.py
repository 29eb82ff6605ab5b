# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes on answering when a node, or one of its cards, dies."""

from __future__ import annotations

from typing import Any


def survival(
    instances: list[dict[str, Any]], nodes: dict[str, dict[str, Any]], fallbacks: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Return one entry for each node, and one for each of its cards where it has several.

    :param fallbacks: per model those that answer in its place, in order.
    """
    found = []
    for host, node in nodes.items():
        found.append(_without(host, instances, fallbacks, lambda one, host=host: one["node"] == host))
        used = [device["id"] for device in node["devices"]]
        for name in used if len(used) > 1 else []:
            found.append(
                _without(
                    f"{host} {name}",
                    instances,
                    fallbacks,
                    lambda one, host=host, name=name: one["node"] == host and name in one["devices"],
                )
            )
    return found


def _without(lost: str, instances: list[dict[str, Any]], fallbacks: dict[str, list[str]], dies: Any) -> dict[str, Any]:
    models = list(dict.fromkeys(one["model"] for one in instances))
    alive = {one["model"] for one in instances if not dies(one)}
    keeps = [name for name in models if name in alive]
    loses = [name for name in models if name not in alive]
    if not models:
        sentence = f"Without {lost}: nothing is planned."
    elif not loses:
        sentence = f"Without {lost}: all models go on answering."
    else:
        words = []
        for name in loses:
            instead = next((other for other in fallbacks.get(name, []) if other in alive), None)
            words.append(f"{name} ({instead} answers for it)" if instead else name)
        stay = "stays" if len(keeps) < 2 else "stay"
        are = "is" if len(words) < 2 else "are"
        sentence = f"Without {lost}: {', '.join(keeps) or 'nothing'} {stay}, {', '.join(words)} {are} lost."
    return {"lost": lost, "keeps": keeps, "loses": loses, "sentence": sentence}
