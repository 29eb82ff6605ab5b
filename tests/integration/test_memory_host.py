# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers on the processor in containers whose limit is the prediction, nothing added; each answers a prompt of nearly
its whole context. As a control, the same with nine tenths of it.

What a server needs is measured as: anonymous memory, what the kernel keeps for it, weights that stay in the file (as
its log names them) and the pages of the program that are there. Pages of weights that were read once are not needed.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gguf, llama_log
from ansible_collections.homelab.inference.plugins.module_utils.memory.predict import predict, totals
from random_models import Model, write

IMAGE = "homelab-inference/llama.cpp:dev"
CGROUP = Path("/sys/fs/cgroup/memory/docker")
PREFIX = f"memhost-{secrets.token_hex(3)}"
MIB = 2**20
SECONDS = 120  # a server and its answer may take, on a busy machine

PLANNED = {"fit": "off", "parallel": 1, "cache-ram": 0, "ctx-checkpoints": 2}
# Threads that wait by spinning would keep others from the processors of a machine that tests many things at a time.
BUSY = {"threads": 1, "poll": 0}

# name: model, options beside those of every server, requests at the same time
EXPERTS = {"architecture": "qwen3moe", "layers": 4, "forward": 1024, "experts": 40}
CASES = {
    "q4_0": (Model("Q4_0", **EXPERTS), {"ctx-size": 1024, "cache-type-k": "f32", "cache-type-v": "f32"}, 1),
    "q4_k": (Model("Q4_K"), {"ctx-size": 1024, "parallel": 2, "cache-type-k": "f32", "cache-type-v": "f32"}, 2),
    "iq4_nl": (Model("IQ4_NL", **EXPERTS, tied=True), {"ctx-size": 1024, "kv-unified": True, "parallel": 2}, 2),
    "q8_0": (Model("Q8_0", layers=4, vocabulary=65536), {"ctx-size": 512, "flash-attn": "off"}, 1),
    "f16": (
        Model("F16", **{**EXPERTS, "experts": 16}),
        {"ctx-size": 512, "cache-type-k": "q8_0", "cache-type-v": "q8_0"},
        1,
    ),
    "windows": (
        Model("Q4_0", "gemma3", window=512, tied=True),
        {"ctx-size": 2048},
        1,
    ),
    "no-mmap": (Model("Q8_0", **EXPERTS), {"ctx-size": 512, "load-mode": "none", "ubatch-size": 256}, 1),
    "no-repack": (Model("Q4_K", **EXPERTS), {"ctx-size": 512, "repack": False, "batch-size": 256}, 1),
}
if not os.environ.get("WHOLE"):
    CASES = {name: CASES[name] for name in ("q4_0", "q4_k", "q8_0", "windows")}

# The control gets this part of what a server that lived could not give back.
LESS = 0.97


def docker(*args, check=True):
    done = subprocess.run(["docker", *args], capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(args)}: {done.stderr}")
    return done.stdout + done.stderr


def command_line(options):
    words = []
    for name, value in options.items():
        words += [f"--{name if value else 'no-' + name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


class Server:
    """One server in a container with a memory limit in MiB."""

    def __init__(self, path, options, limit):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.name = f"{PREFIX}-{secrets.token_hex(3)}"
        # The pages of the file shall be this container's own, not those of whoever wrote it.
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = docker(
            *("run", "--detach", "--name", self.name, "--memory", f"{limit}m", "--memory-swap", f"{limit}m"),
            *("--publish", f"127.0.0.1:{self.port}:8080", "--volume", f"{path.parent}:/models:ro", IMAGE),
            *("--model", f"/models/{path.name}", "--port", "8080", "--verbosity", "4"),
            *command_line(options),
        )
        self.group = CGROUP / found.strip().splitlines()[-1]
        self.pid = int(docker("inspect", "--format", "{{.State.Pid}}", self.name))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        docker("rm", "--force", self.name, check=False)

    def running(self):
        return docker("inspect", "--format", "{{.State.Running}}", self.name).strip() == "true"

    def ready(self):
        """Wait until it answers; whether it does."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and self.running():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return True
            except OSError:
                time.sleep(0.1)
        return False

    def ask(self, tokens, start):
        """Have a prompt of so many tokens answered; whether it was."""
        body = {"prompt": [300 + (start + 7 * index) % 7000 for index in range(tokens)], "n_predict": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)["tokens_evaluated"] == tokens
        except (OSError, ValueError):
            return False

    def number(self, name):
        return int((self.group / name).read_text()) / MIB

    def needs(self):
        """MiB by kind, now."""
        anonymous = program = 0
        here = 0
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            word, *rest = line.split()
            if not word.endswith(":"):
                here = -1 if len(rest) > 4 and rest[4].startswith("/models/") else 1
            elif word == "Anonymous:":
                anonymous += int(rest[0])
            elif word == "Rss:" and here > 0:
                program += int(rest[0])
        return {
            "anonymous": anonymous / 1024,
            "program": (program - anonymous) / 1024,
            "kernel": self.number("memory.kmem.usage_in_bytes"),
        }


def outcome(path, options, together, limit):
    """Run one server under a limit; what it needed, or None when it did not live to answer."""
    with Server(path, options, limit) as server:
        if not server.ready():
            return None
        slots = options["parallel"]
        tokens = options["ctx-size"] // slots - 32
        with ThreadPoolExecutor(together) as pool:
            if not all(pool.map(lambda number: server.ask(tokens, 1000 * number), range(together))):
                return None
        found = server.needs()
        found["peak"] = server.number("memory.max_usage_in_bytes")
        log = docker("logs", server.name)
    # A file that is not mapped lies in anonymous memory.
    mapped = options.get("load-mode") != "none"
    found["weights"] = llama_log.buffers(log)["CPU"]["model"] if mapped else 0
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def outcomes(folder):
    """Per case the plan, its parts, and what happened with it and with a little less than cannot be given back."""
    result = {}
    print(f"\n{'':10}{'plan':>7}{'needed':>9}{'ratio':>7}{'peak':>8}   anonymous kernel weights program   with less")
    for name, (model, options, together) in CASES.items():
        path = folder / f"{name}.gguf"
        write(path, model)
        with path.open("rb") as file:
            shape = gguf.shape([gguf.read_header(file)])
        options = {**PLANNED, **BUSY, **options}
        parts = predict(shape, options, [], "cpu")
        plan = totals(parts)["host"]
        whole = outcome(path, options, together, plan)
        less = outcome(path, options, together, int(LESS * (whole["anonymous"] + whole["kernel"]))) if whole else None
        result[name] = (plan, parts, whole, less)
        path.unlink()
        print(line(name, plan, whole, less), flush=True)
    return result


def line(name, plan, whole, less):
    """A line of the table."""
    if whole is None:
        return f"{name:10}{plan:7}   killed"
    return (
        f"{name:10}{plan:7}{need(whole):9.1f}{plan / need(whole):7.3f}{whole['peak']:8.1f}"
        f"{whole['anonymous']:12.1f}{whole['kernel']:7.1f}{whole['weights']:8.1f}{whole['program']:8.1f}"
        f"   {'killed' if less is None else 'answers'}"
    )


def need(found):
    return sum(found[kind] for kind in ("anonymous", "kernel", "weights", "program"))


def test_whoever_gets_what_was_planned_answers(outcomes):
    assert [name for name, (_plan, _parts, whole, _less) in outcomes.items() if whole is None] == []


def test_no_server_takes_more_than_planned(outcomes):
    for name, (plan, _parts, whole, _less) in outcomes.items():
        assert need(whole) <= plan, name


def test_the_plan_is_close_to_what_is_needed(outcomes):
    ratios = {name: plan / need(whole) for name, (plan, _parts, whole, _less) in outcomes.items()}
    assert statistics.median(ratios.values()) <= 1.05
    for name, (plan, _parts, whole, _less) in outcomes.items():
        assert ratios[name] <= 1.03 or plan - need(whole) <= 32, name


def test_less_than_cannot_be_given_back_is_too_little(outcomes):
    """The control. Above it, pages of the file may be read from the disk again and again: slow, but alive."""
    assert [name for name, (_plan, _parts, _whole, less) in outcomes.items() if less is not None] == []


def test_where_the_engine_fits_itself_and_dies_the_plan_holds_or_refuses(folder):
    """With --fit the engine believes that all memory of the machine is its own."""
    model, options, together = CASES["q4_0"]
    path = folder / "stock.gguf"
    write(path, model)
    with path.open("rb") as file:
        shape = gguf.shape([gguf.read_header(file)])
    limit = totals(predict(shape, {**PLANNED, **options}, [], "cpu"))["host"]
    stock = {"fit": "on", "parallel": 1}
    whole = {"ctx-size": shape["context_length"], "cache-ram": 0, **stock}
    assert totals(predict(shape, whole, [], "cpu"))["host"] > limit  # the plan refuses this
    with Server(path, {**BUSY, **stock}, limit) as server:
        lived = server.ready() and server.ask(shape["context_length"] // 8, 0)
    assert not lived
    path.unlink()
