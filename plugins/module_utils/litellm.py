# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration of a LiteLLM proxy: what is wrong with the input, and the text of the file. Pure."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

HEADER = "# Made by homelab.inference.litellm_config; changes made here by hand are overwritten.\n"

# A name that a client can send, without LiteLLM's wildcard (*) and without what would have to be quoted in a URL.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*")
# Upper case only, so that a key pasted in its place ("sk-...") is refused instead of written to the file.
ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")

# The OpenAI client that LiteLLM uses refuses to start without a key, also where the server asks for none.
NO_KEY = "not-needed"


def find_problems(config: dict[str, Any]) -> list[str]:
    """Everything that is wrong with the input, one sentence or two each, in the order of the input."""
    deployments = config["deployments"]
    problems: list[str] = []
    for deployment in deployments:
        problems += _deployment_problems(deployment)
    problems += _group_problems(deployments)
    modes = {deployment["name"]: deployment["mode"] for deployment in deployments}
    problems += _fallback_problems(config["fallbacks"], modes)
    problems += [f"Fallbacks go round in a circle: {' -> '.join(chain)}." for chain in find_cycles(config["fallbacks"])]
    problems += _alias_problems(config["aliases"], modes, {deployment["id"] for deployment in deployments})
    problems += _setting_problems(config)
    return problems


def _deployment_problems(deployment: dict[str, Any]) -> list[str]:
    name = deployment["id"]
    problems = []
    for key in ("name", "model", "id"):
        if not NAME.fullmatch(deployment[key]):
            problems.append(
                f"Deployment '{name}': {key} '{deployment[key]}' is not a usable name. "
                "Use letters, digits and . _ : / @ + -, beginning with a letter or a digit."
            )
    try:
        url = urlsplit(deployment["api_base"])
        usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if not usable:
        problems.append(f"Deployment '{name}': api_base is not a usable URL. Write it like http://10.0.10.20:8080.")
    elif "@" in url.netloc or url.query or url.fragment:
        # The value is not repeated: it may hold a password.
        problems.append(
            f"Deployment '{name}': api_base has a user, a query or a fragment in it. "
            "Leave those out, and pass a key through api_key_env."
        )
    key_env = deployment.get("api_key_env")
    if key_env and not ENV_NAME.fullmatch(key_env):
        problems.append(
            f"Deployment '{name}': api_key_env is not the name of an environment variable. "
            "Write a name such as LLAMACPP_API_KEY and put the key itself into the proxy's environment."
        )
    return problems


def _group_problems(deployments: list[dict[str, Any]]) -> list[str]:
    problems = []
    seen: set[str] = set()
    modes: dict[str, str] = {}
    for deployment in deployments:
        if deployment["id"] in seen:
            problems.append(f"Deployment id '{deployment['id']}' is used twice. Give each deployment its own id.")
        seen.add(deployment["id"])
        mode = modes.setdefault(deployment["name"], deployment["mode"])
        if mode != deployment["mode"]:
            problems.append(
                f"Model group '{deployment['name']}' has both {mode} and {deployment['mode']} deployments. "
                "Put them into two groups."
            )
    return problems


def _fallback_problems(fallbacks: dict[str, Any], modes: dict[str, str]) -> list[str]:
    problems = []
    for group, others in fallbacks.items():
        if not isinstance(others, list):
            problems.append(f"Fallbacks of '{group}' are not a list. Write them like [chat].")
            continue
        if group not in modes:
            problems.append(f"Fallbacks of '{group}': there is no such model group. {_known(modes)}")
        for other in others:
            if other not in modes:
                problems.append(f"Fallback {group} -> {other}: there is no model group '{other}'. {_known(modes)}")
            elif modes.get(group, modes[other]) != modes[other]:
                problems.append(
                    f"Fallback {group} -> {other}: the first is for {modes[group]}, the second for {modes[other]}. "
                    "Fall back to a group of the same mode."
                )
            if others.count(other) > 1:
                problems.append(f"Fallback {group} -> {other} is named twice. Name it once.")
    return list(dict.fromkeys(problems))


def find_cycles(fallbacks: dict[str, Any]) -> list[list[str]]:
    """Every chain of fallbacks that comes back to where it began, its first group also being its last."""
    cycles: list[list[str]] = []
    finished: set[str] = set()

    def follow(group: str, chain: list[str]) -> None:
        if group in chain:
            cycles.append([*chain[chain.index(group) :], group])
            return
        if group in finished:
            return
        others = fallbacks.get(group)
        for other in dict.fromkeys(others) if isinstance(others, list) else ():
            follow(other, [*chain, group])
        finished.add(group)

    for group in fallbacks:
        follow(group, [])
    return cycles


def _alias_problems(aliases: dict[str, Any], modes: dict[str, str], ids: set[str]) -> list[str]:
    problems = []
    for alias, group in aliases.items():
        if not NAME.fullmatch(alias):
            problems.append(
                f"Alias '{alias}' is not a usable name. "
                "Use letters, digits and . _ : / @ + -, beginning with a letter or a digit."
            )
        if group not in modes:
            problems.append(f"Alias '{alias}' -> '{group}': there is no such model group. {_known(modes)}")
        if alias in modes:
            problems.append(f"Alias '{alias}' would hide the model group of the same name. Rename one of them.")
        elif alias in ids:
            # LiteLLM looks a name up among the ids first, and then asks that one deployment alone.
            problems.append(
                f"Alias '{alias}' is also the id of a deployment, which would go first. Rename one of them."
            )
    return problems


def _setting_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    for key, least in (("num_retries", 0), ("request_timeout", 1), ("cooldown_time", 1), ("health_check_interval", 0)):
        if config[key] < least:
            problems.append(f"{key} is {config[key]}, but has to be at least {least}.")
    cooldown, interval = config["cooldown_time"], config["health_check_interval"]
    if interval > 0 and cooldown <= interval:
        # LiteLLM forgets the failures it counted after cooldown_time, so that the next check would begin at zero.
        problems.append(
            f"cooldown_time is {cooldown} s and health_check_interval is {interval} s: a deployment that failed its "
            f"check would be asked again before the next one. Set cooldown_time above {interval}."
        )
    if not ENV_NAME.fullmatch(config["master_key_env"]):
        problems.append(
            "master_key_env is not the name of an environment variable. "
            "Write a name such as LITELLM_MASTER_KEY and put the key itself into the proxy's environment."
        )
    return problems


def _known(modes: dict[str, str]) -> str:
    return f"Known are: {', '.join(sorted(modes)) or 'none'}."


def model_names(config: dict[str, Any]) -> list[str]:
    """What C(/v1/models) of the proxy lists: the model groups and the aliases."""
    return sorted({deployment["name"] for deployment in config["deployments"]} | set(config["aliases"]))


def config_text(config: dict[str, Any]) -> str:
    """The text of the file, the same for the same content in whatever order it was written.

    It is JSON, which is YAML too: a node may lack PyYAML, and json cannot get quoting wrong.
    """
    deployments = sorted(config["deployments"], key=lambda deployment: (deployment["name"], deployment["id"]))
    fallbacks = {group: others for group, others in config["fallbacks"].items() if others}
    # LiteLLM looks for the fallbacks of the name that was asked for, which may be an alias.
    fallbacks.update({alias: fallbacks[group] for alias, group in config["aliases"].items() if group in fallbacks})
    router: dict[str, Any] = {
        "num_retries": config["num_retries"],
        "timeout": config["request_timeout"],
        "cooldown_time": config["cooldown_time"],
        "fallbacks": [{name: others} for name, others in sorted(fallbacks.items())],
        "model_group_alias": dict(sorted(config["aliases"].items())),
    }
    general: dict[str, Any] = {"master_key": f"os.environ/{config['master_key_env']}"}
    interval = config["health_check_interval"]
    if interval > 0:
        general["background_health_checks"] = True
        general["health_check_interval"] = interval
        general["enable_health_check_routing"] = True
    content = {
        "model_list": [_model(deployment, interval) for deployment in deployments],
        "router_settings": router,
        "general_settings": general,
    }
    return HEADER + json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _model(deployment: dict[str, Any], interval: int) -> dict[str, Any]:
    base = re.sub(r"(/+v1)?/*$", "", deployment["api_base"])
    key_env = deployment.get("api_key_env")
    params: dict[str, Any] = {}
    if deployment["engine"] == "llamacpp":
        params["model"] = f"openai/{deployment['model']}"
        params["api_base"] = f"{base}/v1"
        params["api_key"] = f"os.environ/{key_env}" if key_env else NO_KEY
    else:
        prefix = "ollama" if deployment["mode"] == "embedding" else "ollama_chat"
        params["model"] = f"{prefix}/{deployment['model']}"
        params["api_base"] = base
        if key_env:
            params["api_key"] = f"os.environ/{key_env}"
    # One failure is enough to rest, so that the next try goes elsewhere. LiteLLM spares a group of one from it.
    info: dict[str, Any] = {"id": deployment["id"], "mode": deployment["mode"], "allowed_fails": 0}
    if interval > 0:
        # LiteLLM waits 60 s for a silent model, whatever the interval: one would hold up the checks of all.
        info["health_check_timeout"] = min(interval, 60)
    return {"model_name": deployment["name"], "litellm_params": params, "model_info": info}
