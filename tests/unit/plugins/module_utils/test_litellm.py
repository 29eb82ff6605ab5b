# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The LiteLLM configuration: what is refused and why, and the text that is written."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml
from ansible_collections.homelab.inference.plugins.module_utils.litellm import (
    config_text,
    find_cycles,
    find_problems,
    model_names,
)
from hypothesis import given
from hypothesis import strategies as st


def deployment(name: str, **other: Any) -> dict[str, Any]:
    return {
        "id": name,
        "name": name,
        "engine": "llamacpp",
        "model": name,
        "api_base": "http://10.0.10.20:8080",
        "mode": "chat",
        "api_key_env": None,
        **other,
    }


def config(*deployments: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        "deployments": list(deployments),
        "fallbacks": {},
        "aliases": {},
        "num_retries": 2,
        "request_timeout": 600,
        "cooldown_time": 5,
        "health_check_interval": 0,
        "master_key_env": "LITELLM_MASTER_KEY",
        **other,
    }


def written(*deployments: dict[str, Any], **other: Any) -> dict[str, Any]:
    return yaml.safe_load(config_text(config(*deployments, **other)))


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "//v1//"])
def test_llamacpp_gets_v1_exactly_once(end: str) -> None:
    (entry,) = written(deployment("chat", api_base=f"http://10.0.10.20:8080{end}"))["model_list"]
    assert entry["litellm_params"] == {
        "model": "openai/chat",
        "api_base": "http://10.0.10.20:8080/v1",
        "api_key": "not-needed",
    }
    assert entry["model_info"] == {"id": "chat", "mode": "chat", "allowed_fails": 0}


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_ollama_gets_no_v1(end: str) -> None:
    base = f"http://10.0.10.40:11434{end}"
    chat, embed = written(
        deployment("chat", engine="ollama", model="qwen2.5:32b", api_base=base),
        deployment("embed", engine="ollama", model="nomic-embed-text", api_base=base, mode="embedding"),
    )["model_list"]
    assert chat["litellm_params"] == {"model": "ollama_chat/qwen2.5:32b", "api_base": "http://10.0.10.40:11434"}
    assert embed["litellm_params"] == {"model": "ollama/nomic-embed-text", "api_base": "http://10.0.10.40:11434"}
    assert embed["model_info"]["mode"] == "embedding"


def test_a_path_that_only_looks_like_v1_is_kept() -> None:
    (entry,) = written(deployment("chat", api_base="https://example.net/llm/av1"))["model_list"]
    assert entry["litellm_params"]["api_base"] == "https://example.net/llm/av1/v1"


def test_keys_are_names_of_environment_variables() -> None:
    content = written(deployment("chat", api_key_env="LLAMACPP_API_KEY"), master_key_env="GATEWAY_KEY")
    assert content["model_list"][0]["litellm_params"]["api_key"] == "os.environ/LLAMACPP_API_KEY"
    assert content["general_settings"] == {"master_key": "os.environ/GATEWAY_KEY"}


@pytest.mark.parametrize("key", ["sk-0123456789abcdef", "os.environ/KEY", "with space", "K\n", "dollar$"])
def test_a_key_in_place_of_its_name_is_refused_and_not_repeated(key: str) -> None:
    problems = find_problems(config(deployment("chat", api_key_env=key), master_key_env=key))
    assert len(problems) == 2
    assert not any(key in problem for problem in problems)


@pytest.mark.parametrize("base", ["http://user:pw123@host:80", "http://host/?key=pw123", "http://host/#pw123"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(base: str) -> None:
    (problem,) = find_problems(config(deployment("chat", api_base=base)))
    assert "api_base" in problem
    assert "pw123" not in problem


@pytest.mark.parametrize(
    "base", ["", "10.0.10.20:8080", "ftp://host", "http://", "http://host:port", "http://host:99999"]
)
def test_an_address_that_is_none_is_refused(base: str) -> None:
    (problem,) = find_problems(config(deployment("chat", api_base=base)))
    assert "api_base is not a usable URL" in problem


def test_background_checks_come_with_their_routing_and_time_limit() -> None:
    content = written(deployment("chat"), health_check_interval=30, cooldown_time=31)
    assert content["general_settings"]["background_health_checks"] is True
    assert content["general_settings"]["health_check_interval"] == 30
    assert content["general_settings"]["enable_health_check_routing"] is True
    assert content["model_list"][0]["model_info"]["health_check_timeout"] == 30
    assert "background_health_checks" not in written(deployment("chat"))["general_settings"]


@pytest.mark.parametrize("cooldown", [5, 30])
def test_cooldown_has_to_outlast_the_checks(cooldown: int) -> None:
    (problem,) = find_problems(config(deployment("chat"), health_check_interval=30, cooldown_time=cooldown))
    assert f"cooldown_time is {cooldown} s" in problem
    assert "health_check_interval is 30 s" in problem


def test_fallback_circles_are_named() -> None:
    groups = [deployment(name) for name in ("a", "b", "c", "d")]
    fallbacks = {"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": ["d"]}
    problems = find_problems(config(*groups, fallbacks=fallbacks))
    assert problems == [
        "Fallbacks go round in a circle: a -> b -> c -> a.",
        "Fallbacks go round in a circle: d -> d.",
    ]


def test_fallbacks_name_what_is_wrong_with_them() -> None:
    groups = [deployment("a"), deployment("b"), deployment("e", mode="embedding")]
    fallbacks = {"a": ["x", "e", "b", "b"], "y": ["b"], "b": "a"}
    problems = find_problems(config(*groups, fallbacks=fallbacks))
    assert [problem.split(":")[0].split(" is named")[0] for problem in problems] == [
        "Fallback a -> x",
        "Fallback a -> e",
        "Fallback a -> b",
        "Fallbacks of 'y'",
        "Fallbacks of 'b' are not a list. Write them like [chat].",
    ]


def test_aliases_lead_to_groups_and_hide_nothing() -> None:
    groups = [deployment("chat", id="chat-1"), deployment("chat", id="chat-2"), deployment("code")]
    aliases = {"reason": "chat", "code": "chat", "chat-2": "code", "fast": "none", "any*": "chat"}
    problems = find_problems(config(*groups, aliases=aliases))
    assert [problem.split("'")[1] for problem in problems] == ["code", "chat-2", "fast", "any*"]
    assert model_names(config(*groups, aliases={"reason": "chat"})) == ["chat", "code", "reason"]


def test_groups_are_of_one_mode_and_ids_unique() -> None:
    problems = find_problems(config(deployment("a", id="x"), deployment("a", id="x", mode="embedding")))
    assert [problem.split(".")[0] for problem in problems] == [
        "Deployment id 'x' is used twice",
        "Model group 'a' has both chat and embedding deployments",
    ]


def test_everything_wrong_is_reported_at_once() -> None:
    problems = find_problems(
        config(
            deployment("bad name", api_base="nowhere", api_key_env="sk-secret"),
            fallbacks={"gone": ["bad name"]},
            aliases={"x": "gone"},
            num_retries=-1,
            request_timeout=0,
        )
    )
    assert len(problems) == 9


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdef"), max_size=4), max_size=6))
def test_cycles_are_found_exactly_where_a_walk_can_come_back(fallbacks: dict[str, list[str]]) -> None:
    cycles = find_cycles(fallbacks)
    for chain in cycles:
        assert chain[0] == chain[-1]
        assert all(after in fallbacks[before] for before, after in zip(chain, chain[1:]))
    reach = {group: set(others) for group, others in fallbacks.items()}
    for _step in reach:
        for group in reach:
            reach[group] |= {far for other in reach[group] for far in reach.get(other, ())}
    assert bool(cycles) == any(group in others for group, others in reach.items())


def test_the_order_of_writing_does_not_matter_but_that_of_fallbacks_does() -> None:
    groups = [deployment("chat", id=f"chat-{number}") for number in range(6)] + [deployment("code"), deployment("fast")]
    aliases = {"reason": "chat", "vision": "code"}
    fallbacks = {"code": ["fast", "chat"], "fast": ["chat"]}
    text = config_text(config(*groups, aliases=aliases, fallbacks=fallbacks))
    random.Random(1).shuffle(groups)
    backwards = config(
        *groups,
        aliases=dict(reversed(aliases.items())),
        fallbacks=dict(reversed(fallbacks.items())),
    )
    assert config_text(backwards) == text
    assert yaml.safe_load(text)["router_settings"]["fallbacks"] == [
        {"code": ["fast", "chat"]},
        {"fast": ["chat"]},
        {"vision": ["fast", "chat"]},
    ]
