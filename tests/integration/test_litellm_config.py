# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module litellm_config against a real LiteLLM proxy in front of real llama-servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litellm_lab import LITELLM, NASTY, Lab, ansible, chat, docker, make_images, request, wait_for

MASTER_KEY = f"sk-{NASTY}"
VALIDATE = (
    f"docker run --rm --network none --env LITELLM_LOCAL_MODEL_COST_MAP=True --volume %s:/config.yaml:ro {LITELLM}"
    " --config /config.yaml --validate_config"
)


def apply(path: Path, options: dict[str, Any], *flags: str) -> dict[str, Any]:
    """Run the module the way a task does, and return its result."""
    done = ansible(
        [
            *("ansible", "localhost", "--inventory", "localhost,", "--connection", "local"),
            *("--extra-vars", json.dumps({"ansible_python_interpreter": sys.executable})),
            *("--module-name", "homelab.inference.litellm_config"),
            *("--args", json.dumps({"path": str(path), **options}), *flags),
        ]
    )
    text = done.stdout
    result = json.JSONDecoder().raw_decode(text[text.index("=> ") + 3 :])[0]
    return {
        **result,
        "failed": done.returncode != 0,
        "shown": [line for line in text.splitlines() if line.startswith("+")],
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    make_images()
    made = Lab(tmp_path_factory.mktemp("models"), NASTY)
    yield made
    made.close()


@pytest.fixture(scope="module")
def options(lab: Lab) -> dict[str, Any]:
    servers = [("chat-1", "chat"), ("chat-2", "chat"), ("code", "code"), ("embed", "embed")]
    return {
        "deployments": [
            {
                "id": name,
                "name": model,
                "model": model,
                "api_base": lab.serve(name, model, *(("--embeddings",) if model == "embed" else ())),
                "api_key_env": "LLAMACPP_API_KEY",
                "mode": "embedding" if model == "embed" else "chat",
            }
            for name, model in servers
        ],
        "fallbacks": {"code": ["chat"]},
        "aliases": {"local/programming": "code"},
    }


@pytest.fixture(scope="module")
def gateway(lab: Lab, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    assert apply(path, {**options, "mode": "0644"})["changed"]
    full = lab.run(
        *("gateway", "--publish", "127.0.0.1::4000", "--volume", f"{path}:/config.yaml:ro"),
        *("--env", "LITELLM_LOCAL_MODEL_COST_MAP=True", "--env", f"LITELLM_MASTER_KEY={MASTER_KEY}"),
        *("--env", f"LLAMACPP_API_KEY={NASTY}", LITELLM, "--config", "/config.yaml", "--port", "4000"),
    )
    url = f"http://{docker('port', full, '4000/tcp')}"
    wait_for(f"{url}/health/liveliness", 120)
    return url


def test_the_file_is_written_once(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    dry = apply(path, options, "--check", "--diff")
    assert dry["changed"] and not path.exists()
    first = apply(path, {**options, "mode": "0640"}, "--diff")
    assert first["changed"] and first["shown"] == dry["shown"]
    assert first["models"] == ["chat", "code", "embed", "local/programming"]
    assert path.stat().st_mode & 0o777 == 0o640
    written = path.read_bytes()
    assert [f"+{line}" for line in written.decode().splitlines()] == first["shown"][1:]

    backwards = {**options, "deployments": options["deployments"][::-1]}
    assert not apply(path, {**backwards, "mode": "0640"})["changed"]
    assert path.read_bytes() == written

    edited = {**options, "num_retries": 4, "backup": True}
    assert apply(path, edited, "--check")["changed"] and path.read_bytes() == written
    result = apply(path, edited)
    assert result["changed"] and Path(result["backup_file"]).read_bytes() == written
    assert path.stat().st_mode & 0o777 == 0o640


def test_bad_input_is_named_all_at_once_and_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("the owner's\n")
    bad = {
        **options,
        "fallbacks": {"code": ["chat"], "chat": ["code"]},
        "aliases": {"x": "y"},
        "master_key_env": "sk-1",
    }
    result = apply(path, bad)
    assert result["failed"] and len(result["problems"]) == 3
    assert "code -> chat -> code" in result["msg"]
    assert path.read_text() == "the owner's\n"

    result = apply(tmp_path / "missing" / "config.yaml", options)
    assert result["failed"] and "Make the directory first" in result["msg"]


def test_a_checker_that_objects_keeps_the_file(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("the owner's\n")
    result = apply(path, {**options, "validate": "ls %s /nowhere"})
    assert result["failed"] and "/nowhere" in result["msg"]
    assert path.read_text() == "the owner's\n"
    assert apply(path, {**options, "validate": VALIDATE})["changed"]
    # That LiteLLM's checker can object at all:
    path.write_text('{"model_list": [{"model_name": "a"}]}')
    assert subprocess.run(VALIDATE.replace("%s", str(path)).split(), capture_output=True, check=False).returncode == 1


def test_models_are_listed_for_the_key_alone(gateway: str) -> None:
    status, text = request(f"{gateway}/v1/models", MASTER_KEY)
    assert status == 200
    assert sorted(model["id"] for model in json.loads(text)["data"]) == ["chat", "code", "embed", "local/programming"]
    # Without a database LiteLLM answers 400 ("No connected db.") to a wrong key, and 401 to none.
    for key in (None, "sk-wrong", MASTER_KEY[:-1]):
        status, text = request(f"{gateway}/v1/models", key)
        assert status in (400, 401) and "chat" not in text
        assert chat(gateway, key or "", "chat")[0] in (400, 401)


@pytest.mark.parametrize("model", ["chat", "code", "local/programming"])
def test_group_and_alias_answer(gateway: str, model: str) -> None:
    status, text = chat(gateway, MASTER_KEY, model)
    assert status == 200, text
    assert json.loads(text)["usage"]["completion_tokens"] > 0


def test_an_answer_streams(gateway: str) -> None:
    status, text = chat(gateway, MASTER_KEY, "chat", stream=True)
    assert status == 200, text
    assert text.startswith("data: ") and text.rstrip().endswith("data: [DONE]")


def test_embeddings_come_through_their_group(gateway: str) -> None:
    status, text = request(f"{gateway}/v1/embeddings", MASTER_KEY, {"model": "embed", "input": ["one", "two"]})
    assert status == 200, text
    vectors = [entry["embedding"] for entry in json.loads(text)["data"]]
    assert len(vectors) == 2 and len(vectors[0]) > 8 and vectors[0] != vectors[1]


def test_the_fallback_answers_for_a_server_that_is_gone(lab: Lab, gateway: str, options: dict[str, Any]) -> None:
    bases = {deployment["id"]: deployment["api_base"] for deployment in options["deployments"]}

    def answered() -> int:
        """How many tokens both chat servers have predicted."""
        texts = [request(f"{bases[name]}/metrics", NASTY)[1] for name in ("chat-1", "chat-2")]
        lines = [
            line for text in texts for line in text.splitlines() if line.startswith("llamacpp:tokens_predicted_total")
        ]
        assert len(lines) == 2
        return sum(int(float(line.split()[1])) for line in lines)

    docker("stop", "--time", "1", f"{lab.name}-code")
    for model in ("code", "local/programming"):
        before = answered()
        status, text = chat(gateway, MASTER_KEY, model)
        assert status == 200, text
        assert answered() > before


def test_the_other_replica_answers_for_one_that_is_gone(lab: Lab, gateway: str) -> None:
    docker("stop", "--time", "1", f"{lab.name}-chat-1")
    for _attempt in range(6):
        status, text = chat(gateway, MASTER_KEY, "chat")
        assert status == 200, text
