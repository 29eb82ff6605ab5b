# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Command line, devices and reasons. The logs are those of real runs of llama-server 0.7.0 under Docker 20.10."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import llama_server
from ansible_collections.homelab.inference.plugins.module_utils.llama_server import LlamaServerError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "llama_server"
INSTANCE = {
    "name": "llamacpp-chat",
    "backend": "cpu",
    "devices": [],
    "server_options": {},
    "model_file": "chat.gguf",
    "alias": "chat",
    "port": 8080,
    "published_address": "0.0.0.0",
    "mode": "chat",
    "api_key_file": None,
    "memory_mib": None,
    "cpus": None,
    "env": {},
    "ready_timeout": 900,
}
NVIDIA = {"id": "gpu0", "vendor": "nvidia", "uuid": "GPU-1"}
AMD = {
    "id": "gpu0",
    "vendor": "amd",
    "devices": ["/dev/kfd", "/dev/dri/renderD129", "/dev/dri/card1"],
    "groups": [44, 992],
}
EMULATED = {"id": "gpu0", "vendor": "emulated", "endpoint": "172.17.0.1:50052"}


def instance(**changes):
    return {**INSTANCE, **changes}


def options(**changes):
    """The command line as pairs, so that a test can ask for one option."""
    words = llama_server.arguments(instance(**changes))
    found, index = {}, 0
    while index < len(words):
        bare = index + 1 == len(words) or words[index + 1].startswith("--")
        found[words[index]] = True if bare else words[index + 1]
        index += 1 if bare else 2
    return found


def test_what_a_deployment_depends_on_is_always_said():
    assert options() == {
        "--model": "/models/chat.gguf",
        "--alias": "chat",
        "--host": "0.0.0.0",
        "--port": "8080",
        "--metrics": True,
        "--fit": "off",
        "--device": "none",
        "--cache-ram": "0",
        "--verbosity": "4",
    }


def test_threads_follow_the_limit_and_the_owner_has_the_last_word():
    assert options(cpus=3.5)["--threads"] == "3"
    assert options(cpus=0.5)["--threads"] == "1"
    assert options(cpus=3.5, server_options={"threads": 2, "cache-ram": 512})["--threads"] == "2"
    assert options(server_options={"cache-ram": 512})["--cache-ram"] == "512"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ctx-size", 8192, ["--ctx-size", "8192"]),
        ("temp", 0.7, ["--temp", "0.7"]),
        ("jinja", True, ["--jinja"]),
        ("jinja", False, ["--no-jinja"]),
        ("swa-full", False, []),
        ("no-host", False, []),
        ("no-host", True, ["--no-host"]),
        ("flash-attn", True, ["--flash-attn", "on"]),
        ("flash-attn", False, ["--flash-attn", "off"]),
        ("flash-attn", "auto", ["--flash-attn", "auto"]),
        ("tensor-split", [3, 1], ["--tensor-split", "3,1"]),
        ("chat-template-kwargs", {"b": 1, "a": "x y"}, ["--chat-template-kwargs", '{"a":"x y","b":1}']),
        ("ubatch-size", None, []),
    ],
)
def test_an_option_and_its_value(key, value, words):
    assert llama_server._option(key, value) == words


def test_the_order_of_writing_is_no_change():
    one = llama_server.arguments(instance(server_options={"parallel": 2, "ctx-size": 512}))
    assert one == llama_server.arguments(instance(server_options={"ctx-size": 512, "parallel": 2}))


def test_embedding_and_key():
    assert options(mode="embedding")["--embeddings"] is True
    assert options(api_key_file="/etc/x/key")["--api-key-file"] == llama_server.API_KEY


@pytest.mark.parametrize("key", sorted(llama_server.OWNED))
def test_owned_options_are_refused_with_what_to_use(key):
    with pytest.raises(LlamaServerError, match=f"must not have {key}") as error:
        llama_server.check(instance(server_options={key: "x"}))
    assert llama_server.OWNED[key] in str(error.value)


@pytest.mark.parametrize("key", ["--ctx-size", "ctx_size", "c", "-c", "ctx size", "ngl 5", ""])
def test_what_is_no_long_option_is_refused(key):
    with pytest.raises(LlamaServerError, match="not a long option"):
        llama_server.check(instance(server_options={key: 1}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "cuda"}, "has no device"),
        ({"backend": "cuda", "devices": [AMD]}, "It can use nvidia or tegra"),
        ({"devices": [NVIDIA]}, "use another backend"),
        ({"backend": "rocm", "devices": [{"id": "gpu0", "vendor": "apple"}]}, "its vendor is apple"),
        ({"backend": "cuda", "devices": [{"id": "gpu0", "vendor": "nvidia", "uuid": None}]}, "has no uuid"),
        ({"backend": "emulated", "devices": [{"id": "gpu0", "vendor": "emulated"}]}, "has no endpoint"),
        ({"env": {"LLAMA_API_KEY": "x"}}, "Use api_key_file"),
    ],
)
def test_contradictions_are_refused(changes, said):
    with pytest.raises(LlamaServerError, match=said):
        llama_server.check(instance(**changes))


def test_cuda_asks_with_a_count_and_says_the_order():
    two = instance(backend="cuda", devices=[{**NVIDIA, "uuid": "GPU-2"}, NVIDIA])
    llama_server.check(two)
    assert llama_server.device_access(two) == {
        "devices": [],
        "device_requests": [
            {"driver": "nvidia", "count": 0, "device_ids": ["GPU-2", "GPU-1"], "capabilities": [["gpu"]]}
        ],
        "group_add": [],
        "runtime": None,
    }
    assert llama_server.environment(two) == {"CUDA_VISIBLE_DEVICES": "GPU-2,GPU-1"}
    assert options(backend="cuda", devices=two["devices"])["--device"] == "CUDA0,CUDA1"


def test_rocm_gives_nodes_and_numeric_groups():
    access = llama_server.device_access(instance(backend="rocm", devices=[AMD]))
    assert access["devices"] == ["/dev/dri/card1", "/dev/dri/renderD129", "/dev/kfd"]
    assert access["group_add"] == ["44", "992"]
    assert access["device_requests"] == []
    assert options(backend="rocm", devices=[AMD])["--device"] == "ROCm0"
    bare = llama_server.device_access(instance(backend="rocm", devices=[{"id": "gpu0", "vendor": "amd"}]))
    assert bare["devices"] == ["/dev/dri", "/dev/kfd"]


def test_vulkan_needs_no_kfd_and_drives_three_vendors():
    intel = {"id": "gpu1", "vendor": "intel", "devices": ["/dev/dri/renderD128"], "groups": [992]}
    mixed = instance(backend="vulkan", devices=[AMD, intel, NVIDIA])
    llama_server.check(mixed)
    access = llama_server.device_access(mixed)
    assert access["devices"] == ["/dev/dri/card1", "/dev/dri/renderD128", "/dev/dri/renderD129"]
    assert access["device_requests"][0]["capabilities"] == [["gpu", "graphics", "utility"]]
    assert options(backend="vulkan", devices=[AMD, intel])["--device"] == "Vulkan0,Vulkan1"


def test_sycl_tegra_and_emulated():
    intel = {"id": "gpu0", "vendor": "intel", "devices": ["/dev/dri/renderD128"], "groups": [992]}
    assert llama_server.device_access(instance(backend="sycl", devices=[intel]))["devices"] == ["/dev/dri/renderD128"]
    tegra = instance(backend="cuda", devices=[{"id": "gpu0", "vendor": "tegra"}])
    llama_server.check(tegra)
    assert llama_server.device_access(tegra)["runtime"] == "nvidia"
    assert llama_server.environment(tegra)["NVIDIA_VISIBLE_DEVICES"] == "all"
    two = [EMULATED, {**EMULATED, "id": "gpu1", "endpoint": "172.17.0.1:50053"}]
    found = options(backend="emulated", devices=two)
    assert (found["--rpc"], found["--device"]) == ("172.17.0.1:50052,172.17.0.1:50053", "RPC0,RPC1")


def test_mlock_is_seen():
    assert llama_server.locks_memory(instance(server_options={"load-mode": "mmap+mlock"}))
    assert llama_server.locks_memory(instance(server_options={"mlock": True}))
    assert not llama_server.locks_memory(instance(server_options={"load-mode": "mmap"}))


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("10.0.10.20", "http://10.0.10.20:8080"),
        ("::", "http://[::1]:8080"),
        ("fd00::1", "http://[fd00::1]:8080"),
    ],
)
def test_where_it_answers(address, url):
    assert llama_server.url(instance(published_address=address)) == url


REASONS = {
    "missing_file": "the model file /models/none.gguf is not in the volume",
    "truncated_file": "the model file is corrupt or incomplete",
    "not_gguf": "the model file is not a GGUF file",
    "unreadable_file": "the model file /models/secret.gguf must be readable by all or be root's",
    "unknown_architecture": "this build of llama.cpp does not know the architecture no-such-arch: use a newer image",
    "unknown_option": "this build does not know the option --no-such-flag",
    "invalid_value": "the value of --cache-type-k is not valid (Unsupported cache type: zz)",
    "missing_gpu": "the GPU CUDA0 is not visible in the container",
    "emulated_gpu_away": "the emulated GPU at 127.0.0.1:1 does not answer",
    "buffer_too_large": "the memory of CPU does not suffice",
    "killed_by_limit": "it was killed (exit 137), most likely for want of memory: its limit is 12 MiB",
    "killed": "it was killed (exit 137), most likely for want of memory: the node has no more",
    "no_program": "the image has no llama-server",
    "wrong_architecture": "the image is made for another CPU architecture",
    "port_of_container": "port 8080 of the node is taken",
    "port_of_process": "port 8080 of the node is taken",
    "port_inside": "port 8080 is taken inside the container",
    "no_address": "the node has no address 0.0.0.0 to publish the port on",
    "no_nvidia": "the engine knows no NVIDIA GPUs: the NVIDIA Container Toolkit is missing",
    "no_kfd": "the node has no /dev/kfd",
}


def recorded(name):
    return (FIXTURES / f"{name}.log").read_text(), json.loads((FIXTURES / f"{name}.json").read_text())


def test_every_recording_has_its_reason():
    assert sorted(REASONS) == sorted({path.stem for path in FIXTURES.iterdir()})


@pytest.mark.parametrize("name", sorted(REASONS))
def test_the_reason_of_a_recorded_run(name):
    log, state = recorded(name)
    limit = 12 if name == "killed_by_limit" else None
    assert llama_server.reason(log, state, instance(memory_mib=limit)) == REASONS[name]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        # As the sources of ggml print them: no such card is at hand here.
        (
            "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
            "CUDA could not be initialised",
        ),
        (
            "allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory",
            "the memory of the GPU does not suffice",
        ),
    ],
)
def test_gpu_reasons_typed_by_hand(line, said):
    assert said in llama_server.reason(line, {"ExitCode": 1}, INSTANCE)


def test_the_engine_may_say_that_it_was_the_limit():
    assert llama_server.reason("", {"OOMKilled": True, "ExitCode": 137}, instance(memory_mib=12)) == (
        "it was killed for want of memory: its limit is 12 MiB"
    )


def test_where_nothing_is_known_the_last_error_or_nothing_is_said():
    log = "0.00.1 I srv  fine\n0.00.2 E srv  something new went wrong\n"
    assert llama_server.reason(log, {"ExitCode": 1}, INSTANCE) == "it ended with exit 1: srv  something new went wrong"
    assert llama_server.reason("", {"ExitCode": 134}, INSTANCE) == "it aborted (exit 134)"
    assert llama_server.reason("0.1 I srv  loading model\n", {"Running": True, "ExitCode": 0}, INSTANCE) == ""


def test_the_tail_leaves_backtraces_out():
    log = "".join(f"line {number}\n\n" for number in range(20))
    log += "/usr/lib/x86_64-linux-gnu/libggml-base.so.0(ggml_abort+0x14e) [0x7f]\n/app/llama-server(+0x1261) [0x56]\n"
    assert llama_server.tail(log, 2) == ["line 18", "line 19"]


TURNS = {
    "server_options": {},
    "model_file": None,
    "models": [
        {
            "alias": "chat",
            "volume": "model-chat",
            "model_file": "chat.gguf",
            "mode": "chat",
            "server_options": {"ctx-size": 4096, "repack": False, "flash-attn": True, "swa-full": True},
        },
        {
            "alias": "embed",
            "volume": "library",
            "model_file": "e/embed.gguf",
            "mode": "embedding",
            "server_options": {"tensor-split": [3, 1]},
        },
    ],
}


def test_models_that_take_turns_are_told_in_a_preset_that_the_container_writes() -> None:
    server = instance(**TURNS, backend="emulated", devices=[EMULATED], api_key_file="/etc/key")
    llama_server.check(server)
    preset, *rest = llama_server.command(server, ["/app/llama-server"])
    assert rest == [
        *("/app/llama-server", "--models-preset", "/tmp/models.ini", "--models-max", "1"),
        *("--host", "0.0.0.0", "--port", "8080", "--api-key-file", "/run/secrets/llama-api-key"),
    ]
    assert (
        preset
        == """version = 1

[chat]
model = /models/model-chat/chat.gguf
metrics = true
fit = off
rpc = 172.17.0.1:50052
device = RPC0
cache-ram = 0
ctx-size = 4096
flash-attn = on
no-repack = true
swa-full = true
verbosity = 4
load-on-startup = true

[embed]
model = /models/library/e/embed.gguf
metrics = true
fit = off
rpc = 172.17.0.1:50052
device = RPC0
embeddings = true
cache-ram = 0
tensor-split = 3,1
verbosity = 4
"""
    )
    assert llama_server.entrypoint(server, ["/app/llama-server"])[0] == "/bin/sh"
    assert llama_server.entrypoint(instance(), ["/app/llama-server"]) == ["/app/llama-server"]
    assert llama_server.mode(server) == "turns"


def test_turns_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(LlamaServerError, match="either a model_file in a volume, or models"):
        llama_server.check(instance(models=TURNS["models"]))
    with pytest.raises(LlamaServerError, match="either a model_file in a volume, or models"):
        llama_server.check(instance(model_file=None))
    with pytest.raises(LlamaServerError, match="per model"):
        llama_server.check(instance(**{**TURNS, "server_options": {"ctx-size": 1}}))
    bad = {**TURNS["models"][0], "server_options": {"port": 1}}
    with pytest.raises(LlamaServerError, match="chat of llamacpp-chat must not have port"):
        llama_server.check(instance(**{**TURNS, "models": [bad]}))


@pytest.mark.parametrize(
    "change",
    [
        {"server_options": {"chat-template": "a\nmodel = /etc/shadow"}},
        {"server_options": {"chat-template": "{# a comment #}"}},
        {"server_options": {"lora": ["a", "b\nmlock = true"]}},
        {"server_options": {"chat-template-kwargs": {"a": "b;c"}}},
        {"server_options": {"override-kv": "--x"}},
        {"model_file": "a #1.gguf"},
        {"alias": "a]\n[b"},
    ],
)
def test_what_a_preset_cannot_hold_is_refused_there_and_taken_alone(change):
    model = {**TURNS["models"][0], **change}
    with pytest.raises(LlamaServerError, match="cannot be given to a model that takes turns"):
        llama_server.check(instance(**{**TURNS, "models": [model]}))
    alone = {key: value for key, value in change.items() if key != "alias"}
    llama_server.check(instance(**alone))


def test_any_of_several_models_may_lock_memory() -> None:
    locked = {**TURNS["models"][0], "server_options": {"load-mode": "mlock"}}
    assert llama_server.locks_memory(instance(**{**TURNS, "models": [TURNS["models"][1], locked]}))
    assert not llama_server.locks_memory(instance(**TURNS))
