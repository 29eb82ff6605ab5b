# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a llama-server needs to be told, and what its log says when it dies. Pure: an instance in, values out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils.probe import TURNS

MODELS = "/models"
API_KEY = "/run/secrets/llama-api-key"
# What a server whose models take turns is told of them. The container writes it itself, so that nothing outside it has
# to fit to it, and one that is put back is what it was.
PRESET = "/tmp/models.ini"
WRITE_PRESET = ["/bin/sh", "-c", f'printf %s "$1" >{PRESET} && shift && exec "$@"', "sh"]
SECOND = 10**9

# Options that follow from others: never passed through, so that the plan and the server cannot disagree.
OWNED = {
    "host": "published_address",
    "port": "port",
    "model": "model_file",
    "model-url": "model_file",
    "hf-repo": "model_file",
    "hf-file": "model_file",
    "hf-token": "model_file",
    "alias": "alias",
    "api-key": "api_key_file",
    "api-key-file": "api_key_file",
    "device": "devices",
    "rpc": "devices",
    "embedding": "mode",
    "embeddings": "mode",
    "metrics": "",
    "fit": "",
}
# Their value is a word although YAML reads on and off as booleans.
ON_OFF = {"flash-attn", "log-colors"}
# Flags that llama-server knows only as they are, without a --no- form.
ONLY_POSITIVE = {
    "backend-sampling",
    "check-tensors",
    "cpu-moe",
    "cpu-moe-draft",
    "ignore-eos",
    "log-disable",
    "lora-init-without-apply",
    "mlock",
    "offline",
    "props",
    "rerank",
    "reranking",
    "reuse-port",
    "spec-draft-cpu-moe",
    "special",
    "spm-infill",
    "swa-full",
    "verbose",
}
# How llama.cpp calls the devices of a backend, and whose cards it can drive.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("", ()),
    "cuda": ("CUDA", ("nvidia", "tegra")),
    "rocm": ("ROCm", ("amd",)),
    "vulkan": ("Vulkan", ("nvidia", "amd", "intel")),
    "sycl": ("SYCL", ("intel",)),
    "emulated": ("RPC", ("emulated",)),
}


class LlamaServerError(Exception):
    """An instance that no llama-server can be started from."""


def check(instance: Mapping[str, Any]) -> None:
    """Refuse what contradicts itself, before anything is touched."""
    name, backend, devices = instance["name"], instance["backend"], instance["devices"] or []
    vendors = BACKENDS[backend][1]
    if vendors and not devices:
        raise LlamaServerError(
            f"Backend {backend} of {name} has no device: it would serve from the CPU. Give devices, or use backend cpu."
        )
    for device in devices:
        if device.get("vendor") not in vendors:
            remedy = f"It can use {' or '.join(vendors)}." if vendors else "Leave devices out, or use another backend."
            raise LlamaServerError(
                f"Backend {backend} of {name} cannot use device {device.get('id')}: "
                f"its vendor is {device.get('vendor')}. {remedy}"
            )
        needed = {"nvidia": "uuid", "emulated": "endpoint"}.get(device["vendor"])
        if needed and not device.get(needed):
            raise LlamaServerError(
                f"Device {device.get('id')} of {name} has no {needed}: it cannot be told from others. "
                "Take it from gpu_facts."
            )
    if bool(several(instance)) == bool(instance["model_file"]):
        raise LlamaServerError(f"{name} has to have either a model_file in a volume, or models. Give one of them.")
    if several(instance) and instance["server_options"]:
        raise LlamaServerError(f"server_options of {name} must be given per model: it has several. Move them there.")
    for model in several(instance):
        _check_options(f"{model['alias']} of {name}", model["server_options"] or {})
        _check_preset(f"{model['alias']} of {name}", model)
    _check_options(name, instance["server_options"] or {})
    if "LLAMA_API_KEY" in (instance["env"] or {}):
        raise LlamaServerError(
            f"env of {name} must not have LLAMA_API_KEY: anyone who may inspect the container would read it. "
            "Use api_key_file."
        )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for key in options:
        if key in OWNED:
            remedy = f"Use the option {OWNED[key]} instead." if OWNED[key] else "It is always set; leave it out."
            raise LlamaServerError(f"server_options of {name} must not have {key}: this module sets it. {remedy}")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9.]+)*", str(key)) or len(str(key)) < 3:
            raise LlamaServerError(
                f"server_options of {name} has {key}: it is not a long option of llama-server. "
                "Write it in full, without leading dashes: ctx-size."
            )


def _check_preset(name: str, model: Mapping[str, Any]) -> None:
    """Refuse what a preset cannot hold: it has no quotes, and ends a value at a line's end, a C(;) or a C(#)."""
    values = {"alias": model["alias"], "model_file": model["model_file"]}
    for key, value in (model["server_options"] or {}).items():
        values[f"server_options.{key}"] = " ".join(_option(key, value)[1:])
    for key, text in values.items():
        if re.search(r"[;#\r\n]|^--", text) or (key == "alias" and "]" in text):
            raise LlamaServerError(
                f"{key} of {name} cannot be given to a model that takes turns: it has a line break, ; or #, or begins "
                "with --. Write it otherwise, or keep the model by itself."
            )


def entrypoint(instance: Mapping[str, Any], program: list[str]) -> list[str]:
    """The container's entry point; C(program) is the image's."""
    return WRITE_PRESET if several(instance) else program


def command(instance: Mapping[str, Any], program: list[str]) -> list[str]:
    """The container's command line after its entry point."""
    told = arguments(instance)
    return [preset(instance), *program, *told] if several(instance) else told


def arguments(instance: Mapping[str, Any]) -> list[str]:
    """The command line after the program: what matters is said, never left to a default of the build."""
    listen = ["--host", "0.0.0.0", "--port", str(instance["port"])]
    if several(instance):
        key = ["--api-key-file", API_KEY] if instance["api_key_file"] else []
        return ["--models-preset", PRESET, "--models-max", "1", *listen, *key]
    path = f"{MODELS}/{instance['model_file']}"
    return ["--model", path, "--alias", instance["alias"], *listen, *_arguments(instance, instance)]


def several(instance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models that take turns on a server; none where it has one for itself."""
    return instance.get("models") or []


def mode(instance: Mapping[str, Any]) -> str:
    """How its health is asked for (probe.py)."""
    return TURNS if several(instance) else instance["mode"]


def preset(instance: Mapping[str, Any]) -> str:
    """The models that take turns, as llama-server's router mode reads them: an option a line.

    The first is loaded at the start, so that a server that cannot work is found when it is deployed.
    Options of the command line would count for all of them, before their own: there are none but those of the router.
    """
    lines = ["version = 1"]
    for model in several(instance):
        lines += ["", f"[{model['alias']}]", f"model = {model_path(model)}"]
        argv = _arguments(instance, model)
        for number, word in enumerate(argv):
            if word.startswith("--"):
                value = argv[number + 1] if argv[number + 1 : number + 2] else "--"
                lines.append(f"{word[2:]} = {'true' if value.startswith('--') else value}")
        if model is several(instance)[0]:
            lines.append("load-on-startup = true")
    return "\n".join(lines) + "\n"


def model_path(model: Mapping[str, Any]) -> str:
    """Where one of several models lies in the container: each volume has a directory of its own."""
    return f"{MODELS}/{model['volume']}/{model['model_file']}"


def _arguments(instance: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """What is said of a model, beside its file and its name."""
    devices = instance["devices"] or []
    prefix = BACKENDS[instance["backend"]][0]
    argv = ["--metrics", "--fit", "off"]
    if instance["backend"] == "emulated":
        argv += ["--rpc", ",".join(device["endpoint"] for device in devices)]
    # Named devices make the server refuse to start where a card is missing; unnamed ones make it serve from the CPU.
    argv += ["--device", ",".join(f"{prefix}{index}" for index in range(len(devices))) or "none"]
    if model["mode"] == "embedding":
        argv.append("--embeddings")
    if model.get("api_key_file"):
        argv += ["--api-key-file", API_KEY]
    # From 4 on the server says how much memory it takes; it says nothing of what it is asked before 5.
    options: dict[str, Any] = {"cache-ram": 0, "verbosity": 4}
    if instance["cpus"]:
        options["threads"] = max(1, int(instance["cpus"]))
    options.update(model["server_options"] or {})
    for key in sorted(options):
        argv += _option(key, options[key])
    return argv


def _option(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        if key in ON_OFF:
            return [f"--{key}", "on" if value else "off"]
        if value:
            return [f"--{key}"]
        return [] if key in ONLY_POSITIVE or key.startswith("no-") else [f"--no-{key}"]
    if isinstance(value, (list, tuple)):
        return [f"--{key}", ",".join(str(item) for item in value)]
    if isinstance(value, Mapping):
        return [f"--{key}", json.dumps(value, sort_keys=True, separators=(",", ":"))]
    return [f"--{key}", str(value)]


def environment(instance: Mapping[str, Any]) -> dict[str, str]:
    """Variables of the container. The order of the cards is said here: tensor-split and main-gpu count in it."""
    env = {}
    vendors = {device["vendor"] for device in instance["devices"] or []}
    if instance["backend"] == "cuda" and "tegra" not in vendors:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(device["uuid"] for device in instance["devices"])
    if "tegra" in vendors:
        env.update(NVIDIA_VISIBLE_DEVICES="all", NVIDIA_DRIVER_CAPABILITIES="compute,utility")
    env.update({str(key): str(value) for key, value in (instance["env"] or {}).items()})
    return env


def device_access(instance: Mapping[str, Any]) -> dict[str, Any]:
    """How the container reaches its cards: keys devices, device_requests, group_add (as strings), runtime."""
    access: dict[str, Any] = {"devices": [], "device_requests": [], "group_add": [], "runtime": None}
    paths: set[str] = set()
    groups: set[str] = set()
    uuids = []
    for device in instance["devices"] or []:
        if device["vendor"] == "nvidia":
            uuids.append(device["uuid"])
        elif device["vendor"] == "tegra":
            access["runtime"] = "nvidia"
        elif device["vendor"] in ("amd", "intel"):
            paths.update(device.get("devices") or ["/dev/dri"])
            if instance["backend"] == "rocm":
                paths.add("/dev/kfd")
            # Names of groups are those of the host; the image need not know them.
            groups.update(str(gid) for gid in device.get("groups") or [])
    if uuids:
        # Docker stores count 0 where none is given: without it every comparison would find a difference.
        capabilities = ["gpu", "graphics", "utility"] if instance["backend"] == "vulkan" else ["gpu"]
        access["device_requests"] = [
            {"driver": "nvidia", "count": 0, "device_ids": uuids, "capabilities": [capabilities]}
        ]
    if instance["backend"] != "rocm":
        paths.discard("/dev/kfd")
    access["devices"] = sorted(paths)
    access["group_add"] = sorted(groups)
    return access


def locks_memory(instance: Mapping[str, Any]) -> bool:
    """Whether the server is told to keep the model in RAM, which a container without capabilities may not."""
    return any(_locks(one["server_options"] or {}) for one in [instance, *several(instance)])


def _locks(options: Mapping[str, Any]) -> bool:
    return "mlock" in str(options.get("load-mode", "")) or bool(options.get("mlock"))


def healthcheck(instance: Mapping[str, Any]) -> dict[str, Any]:
    """Instead of the image's, which asks a port of its own choice. Until ready_timeout a failure does not count."""
    url = f"http://127.0.0.1:{instance['port']}/health"
    return {
        "Test": ["CMD", "curl", "-fsS", "-o", "/dev/null", "-m", "5", url],
        "Interval": 30 * SECOND,
        "Timeout": 10 * SECOND,
        "Retries": 3,
        "StartPeriod": instance["ready_timeout"] * SECOND,
    }


def url(instance: Mapping[str, Any]) -> str:
    """Where the server answers, seen from its own node."""
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(
        instance["published_address"], instance["published_address"]
    )
    if ":" in address and not address.startswith("["):
        address = f"[{address}]"
    return f"http://{address}:{instance['port']}"


# What the engine says when it cannot start a container.
START_ERRORS = (
    (r"port is already allocated|address already in use", "port {port} of the node is taken"),
    (r"cannot assign requested address", "the node has no address {address} to publish the port on"),
    (r"could not select device driver", "the engine knows no NVIDIA GPUs: the NVIDIA Container Toolkit is missing"),
    (
        r"unknown or invalid runtime name: (\S+)",
        "the engine has no runtime {0}: the NVIDIA Container Toolkit is missing",
    ),
    (r"nvidia-container-cli: (.+?): unknown", "the NVIDIA Container Toolkit refused: {0}"),
    (r"error gathering device information while adding custom device \"([^\"]+)\"", "the node has no {0}"),
    (r"exec format error", "the image is made for another CPU architecture"),
    (r"executable file not found|no such file or directory: unknown", "the image has no llama-server"),
)
# What llama-server says, the deeper cause before the line that it leads to.
LOG_ERRORS = (
    (r"exec format error", "the image is made for another CPU architecture"),
    (r"error: (?:invalid|unknown) argument: (\S+)", "this build does not know the option {0}"),
    (
        r"error while handling argument \"--device\": invalid device: (\S+)",
        "the GPU {0} is not visible in the container",
    ),
    (r"error while handling argument \"(--[^\"]+)\": (.+)", "the value of {0} is not valid ({1})"),
    (r"couldn't bind HTTP server socket.*port: (\d+)", "port {0} is taken inside the container"),
    (r"failed to open GGUF file '([^']+)' \(No such file or directory\)", "the model file {0} is not in the volume"),
    (
        r"failed to open GGUF file '([^']+)' \(Permission denied\)",
        "the model file {0} must be readable by all or be root's",
    ),
    (r"failed to open GGUF file '([^']+)' \(([^)]+)\)", "the model file {0} cannot be opened ({1})"),
    (r"invalid magic characters", "the model file is not a GGUF file"),
    (r"data is not within the file bounds", "the model file is corrupt or incomplete"),
    (
        r"unknown model architecture: '([^']+)'",
        "this build of llama.cpp does not know the architecture {0}: use a newer image",
    ),
    (
        r"failed to initialize (CUDA|ROCm|HIP): (.+)",
        "{0} could not be initialised ({1}): look at the driver of the node",
    ),
    (r"(CUDA|ROCm|HIP) error: out of memory", "the memory of the GPU does not suffice"),
    (r"cudaMalloc failed: out of memory|ErrorOutOfDeviceMemory", "the memory of the GPU does not suffice"),
    (r"(?:unable|failed) to allocate (\S+) buffer(?: of size (\d+))?", "the memory of {0} does not suffice"),
    (r"insufficient memory \(attempted to allocate ([\d.]+ MB)\)", "out of memory ({0} asked for)"),
    (r"(CUDA|ROCm|HIP) error: (.+)", "{0} failed ({1})"),
    (r"Failed to connect to (\S+:\d+)", "the emulated GPU at {0} does not answer"),
    (r"error loading model: (.+)", "the model could not be loaded ({0})"),
    (r"failed to load model", "the model could not be loaded"),
)
SIGNALS = {132: "the image is built for a newer CPU", 134: "it aborted", 139: "it crashed"}


def reason(log: str, state: Mapping[str, Any], instance: Mapping[str, Any]) -> str:
    """Why the server does not serve, in half a sentence, from its docker inspect state and the log of this start.

    Empty where neither says anything.
    """
    words = {"port": instance["port"], "address": instance["published_address"]}
    if state.get("Error"):
        return _match(START_ERRORS, state["Error"], words) or state["Error"]
    limit = f"its limit is {instance['memory_mib']} MiB" if instance["memory_mib"] else "the node has no more"
    if state.get("OOMKilled"):
        return f"it was killed for want of memory: {limit}"
    found = _match(LOG_ERRORS, log, words)
    code = state.get("ExitCode", 0)
    if found or state.get("Running") or not code:
        return found
    if code == 137:
        return f"it was killed (exit 137), most likely for want of memory: {limit}"
    errors = re.findall(r"^[\d.]+ E (.+)$", log, re.MULTILINE)
    ended = f"{SIGNALS[code]} (exit {code})" if code in SIGNALS else f"it ended with exit {code}"
    return f"{ended}: {errors[-1].strip()}" if errors else ended


def _match(table: tuple[tuple[str, str], ...], text: str, words: Mapping[str, Any]) -> str:
    for pattern, sentence in table:
        found = re.search(pattern, text)
        if found:
            return sentence.format(*(group or "" for group in found.groups()), **words)
    return ""


def tail(log: str, lines: int = 15) -> list[str]:
    """The last lines of a log, without the frames of a backtrace, which say nothing to the reader."""
    kept = [
        line.rstrip() for line in log.splitlines() if line.strip() and not re.match(r"\S+\.so\S*\(|\S+\(\+0x", line)
    ]
    return kept[-lines:]
