# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a plan: each server and each emulated GPU is a container that may take what was planned, and no more.

What a container took is what memory/host.py says that a server needs: memory that cannot be given back (anonymous
and the kernel's own), the pages of the program, and those pages of the model's file that are needed again and again.
The first is sampled. For the last, all pages of the file are taken away from a server that has become healthy; those
that come back during the prompts are counted, whether they stay or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy
from ansible_collections.homelab.inference.plugins.module_utils import llama_server

from tests.fitting.files import MIB
from tests.fitting.registries import Registry

IMAGE = "homelab-inference/llama.cpp:dev"
CGROUPS = Path("/sys/fs/cgroup/memory/docker")
PORT = 8080
FIRST_ENDPOINT = 50052
HERTZ, LOOK_EVERY = 10, 5
# Tokens of the context that the prompt leaves free, and how many of them the answer takes. Before that comes a short
# prompt with a long answer: of a prompt, only the last token goes through the last layer's experts.
FREE, ANSWER = 16, 4
FIRST_PROMPT, FIRST_ANSWER = 8, 64
READY_SECONDS = 180.0
# Linux numbers: the system call process_madvise, and the advice to take pages away.
PROCESS_MADVISE, PAGEOUT = 440, 21
PAGE = os.sysconf("SC_PAGE_SIZE")


class ExecutionError(Exception):
    """The engine did not do what it was told; this says nothing of the plan."""


@dataclass
class Taken:
    """What one container was given and took, in MiB."""

    planned: int  # the limit
    kept: float = 0.0  # cannot be given back, at its peak
    program: float = 0.0  # pages of programs and libraries
    model: float = 0.0  # pages of the model's file that the prompts touched
    read: float = 0.0  # from the disk, since the model's pages were taken away

    @property
    def peak(self) -> float:
        return self.kept + self.program + self.model


@dataclass
class Outcome:
    """What became of one registry."""

    taken: dict[tuple[str, str], Taken] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise ExecutionError(f"docker {arguments[0]} failed: {done.stderr.strip()[-300:]}")
    return (done.stdout + done.stderr).strip()


class Container:
    """One container with a limit."""

    def __init__(self, name: str, limit: int, arguments: list[str]) -> None:
        self.name, self.limit = name, limit
        docker(
            *("run", "--detach", "--name", name, "--memory", f"{limit}m", "--memory-swap", f"{limit}m"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp"),
            *arguments,
        )
        self.group, self.address = self._where()
        self.samples: list[float] = []
        self.killed = False
        self.pages: dict[tuple[int, int], numpy.ndarray] = {}  # those seen, by process and address
        self.read = 0

    def _where(self) -> tuple[Path, str]:
        found = json.loads(docker("inspect", self.name))[0]
        return CGROUPS / found["Id"], next(iter(found["NetworkSettings"]["Networks"].values()))["IPAddress"]

    def restart(self) -> None:
        """Start it again; its address may be another then."""
        docker("restart", "--time", "0", self.name)
        self.group, self.address = self._where()

    def end(self, words: str) -> None:
        """End the process with these words in its command line, for good: another one takes its place."""
        for process in self.processes():
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{process}/cmdline").read_text():
                    os.kill(process, signal.SIGKILL)

    def state(self) -> dict[str, Any]:
        return json.loads(docker("inspect", "--format", "{{json .State}}", self.name))

    def sample(self) -> None:
        """Note what cannot be given back, and whether somebody was killed."""
        with contextlib.suppress(OSError, KeyError):
            found = _numbers(self.group / "memory.stat")
            kernel = int((self.group / "memory.kmem.usage_in_bytes").read_text())
            self.samples.append((found["rss"] + found["shmem"] + kernel) / MIB)
            self.killed |= _numbers(self.group / "memory.oom_control")["oom_kill"] > 0

    def processes(self) -> list[int]:
        with contextlib.suppress(OSError):
            return [int(line) for line in (self.group / "cgroup.procs").read_text().split()]
        return []

    def problem(self) -> str:
        """Why it does not run any more, or lost a process; nothing when all is well."""
        state = self.state()
        # 137: the engine may miss who killed it.
        if self.killed or state["OOMKilled"] or state["ExitCode"] == 137:
            return f"was killed for want of memory at {self.limit} MiB"
        return "" if state["Running"] else f"ended with {state['ExitCode']}"

    def watch(self) -> None:
        """Take the model's pages away, and note from now on which ones come back."""
        for process in self.processes():
            take_away(process)
            for path, start, length, _there in mappings(process):
                if is_model(path):
                    self.pages[process, start] = numpy.zeros(length // PAGE, bool)
            self.read -= read_bytes(process)

    def look(self) -> None:
        """Note the pages that are in memory."""
        for (process, start), seen in self.pages.items():
            with contextlib.suppress(OSError), Path(f"/proc/{process}/pagemap").open("rb", buffering=0) as stream:
                stream.seek(start // PAGE * 8)
                entries = numpy.frombuffer(stream.read(len(seen) * 8), numpy.uint64)
                seen[: len(entries)] |= entries >> numpy.uint64(63) > 0

    def taken(self) -> Taken:
        """What it took of files; the rest is known in the end."""
        self.look()
        taken = Taken(self.limit, model=sum(int(seen.sum()) for seen in self.pages.values()) * PAGE / MIB)
        for process in self.processes():
            taken.read += (self.read + read_bytes(process)) / MIB if self.pages else 0
            taken.program += sum(there for path, *_range, there in mappings(process) if not is_model(path)) / 1024
        return taken

    def log(self) -> str:
        return docker("logs", self.name, check=False)


def _numbers(path: Path, between: str = " ") -> dict[str, int]:
    return {name: int(value) for name, value in (line.split(between) for line in path.read_text().splitlines())}


def mappings(process: int) -> Iterator[tuple[str, int, int, int]]:
    """The mapped files of a process: path, address, bytes, and KiB that are in memory as they are in the file."""
    path, start, end, there = "", 0, 0, 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            name, *rest = line.split()
            if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", name):
                start, end = (int(address, 16) for address in name.split("-"))
                path = rest[4] if len(rest) > 4 else ""
            elif name == "Rss:":
                there = int(rest[0])
            elif name == "Anonymous:" and path.startswith("/"):
                yield path, start, end - start, there - int(rest[0])


def read_bytes(process: int) -> int:
    """What it read from disks, for mapped files too."""
    found = _numbers(Path(f"/proc/{process}/io"), ": ")
    return found["read_bytes"]


def is_model(path: str) -> bool:
    return path.startswith(f"{llama_server.MODELS}/")


def take_away(process: int) -> None:
    """Take all pages of the model's file away from a process."""

    class Range(ctypes.Structure):
        _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))

    system = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(process)
    try:
        for path, start, length, _there in list(mappings(process)):
            if is_model(path):
                one = Range(start, length)
                if system.syscall(PROCESS_MADVISE, handle, ctypes.byref(one), 1, PAGEOUT, 0) < 0:
                    raise ExecutionError(f"process_madvise failed: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(handle)


class Execution:
    """One plan in containers, all of them gone afterwards."""

    def __init__(
        self, registry: Registry, share: float = 1.0, image: str = IMAGE, prompt_seconds: float = 900.0
    ) -> None:
        self.registry, self.share, self.image = registry, share, image
        self.prompt_seconds = prompt_seconds
        self.prefix = f"fitting-{secrets.token_hex(4)}"
        self.network = self.prefix
        self.servers: dict[str, Container] = {}
        self.devices: dict[tuple[str, str], Container] = {}
        self.outcome = Outcome()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def run(self) -> Outcome:
        """Start in the order of the plan, ask all at once, look at what it took."""
        started = time.monotonic()
        sampler = threading.Thread(target=self._sample, daemon=True)
        try:
            docker("network", "create", "--internal", self.network)
            sampler.start()
            self._start_devices()
            for instance in sorted(self.registry.instances, key=lambda one: (one["start"], one["node"])):
                if not self._start(instance):
                    return self.outcome
            self._ask()
            self._measure(self._servers())
            self._again()
            self._measure(self.devices.items())
            return self.outcome
        finally:
            self._over.set()
            if sampler.ident:
                sampler.join()
            self._look()
            self.outcome.seconds = time.monotonic() - started
            # By name: one that was being made when something went wrong is in no list.
            left = docker("ps", "--all", "--quiet", "--filter", f"name=^{self.prefix}", check=False).split()
            docker("rm", "--force", *left, check=False)
            docker("network", "rm", self.network, check=False)

    def _limit(self, planned: int) -> int:
        return int(planned * self.share)

    def _start_devices(self) -> None:
        """One container for each GPU in use, in it one ggml-rpc-server for each server, as emulated_gpu.py has it."""
        for (node, device), planned in self.registry.budgets().items():
            users = self._users(node, device)
            if not users:
                continue
            ports = [str(FIRST_ENDPOINT + index) for index in range(len(users))]
            serve = "while :; do ggml-rpc-server --host 0.0.0.0 --port $port --threads 1; done"
            script = f"for port; do ({serve}) & done; wait"
            container = Container(
                f"{self.prefix}-{node}-{device}",
                self._limit(planned),
                ["--network", self.network, "--entrypoint", "sh", self.image, "-c", script, "sh", *ports],
            )
            with self._lock:
                self.devices[node, device] = container
            self._wait(functools.partial(_listens, container, len(users)))

    def _users(self, node: str, device: str) -> list[str]:
        return [one["name"] for one in self.registry.instances if one["node"] == node and device in one["devices"]]

    def _start(self, instance: dict[str, Any]) -> bool:
        """Start a server, and say whether it became healthy."""
        name, file = instance["name"], self.registry.file(instance)
        devices = {device["id"]: device for device in self.registry.nodes[instance["node"]]["devices"]}
        reached = []
        for device in instance["devices"]:
            container = self.devices[instance["node"], device]
            port = FIRST_ENDPOINT + self._users(instance["node"], device).index(name)
            reached.append({**devices[device], "endpoint": f"{container.address}:{port}"})
        server = {
            **instance,
            "alias": instance["model"],
            "devices": reached,
            "port": PORT,
            "model_file": file.path.name,
            "api_key_file": None,
            "cpus": self.registry.nodes[instance["node"]]["cpus"],
            "env": {},
        }
        llama_server.check(server)
        # Nothing of the file may be in memory yet, or it would be charged to somebody else.
        with file.path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        container = Container(
            f"{self.prefix}-{name}",
            self._limit(instance["memory"]["host"]),
            [
                *("--network", self.network, "--volume", f"{file.path.parent}:{llama_server.MODELS}:ro"),
                *(self.image, *llama_server.arguments(server)),
            ],
        )
        with self._lock:
            self.servers[name] = container
        if not self._wait(functools.partial(_healthy, container)):
            if not self._fallen():
                self.outcome.problems.append(f"{name} was not healthy within {READY_SECONDS:.0f} s")
            return False
        container.watch()
        return True

    def _wait(self, there: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if there():
                return True
            if self._fallen():
                return False
            time.sleep(0.2)
        return False

    def _fallen(self) -> bool:
        """Whether a container ended or lost a process."""
        with self._lock:
            containers = [*self.servers.values(), *self.devices.values()]
        return any(one.killed or not one.processes() for one in containers)

    def _ask(self) -> None:
        """A prompt of nearly full context for every slot of every server, all at the same time."""
        threads = []
        for instance in self.registry.instances:
            for slot in range(instance["server_options"]["parallel"]):
                threads.append(threading.Thread(target=self._ask_one, args=(instance, slot), daemon=True))
                threads[-1].start()
        while any(thread.is_alive() for thread in threads):
            if self._fallen():
                # The others would only take longer to say the same.
                for _key, container in self._containers():
                    docker("kill", container.name, check=False)
            time.sleep(0.2)

    def _ask_one(self, instance: dict[str, Any], slot: int) -> None:
        options = instance["server_options"]
        length = options["ctx-size"] // options["parallel"] - FREE
        random = Random(f"{instance['name']} {slot}")
        problem = self._answer(instance, slot, random, FIRST_PROMPT, FIRST_ANSWER)
        problem = problem or self._answer(instance, slot, random, length, ANSWER)
        if problem:
            self.outcome.problems.append(f"{instance['name']} slot {slot} {problem}")

    def _answer(self, instance: dict[str, Any], slot: int, random: Random, length: int, answer: int) -> str:
        """Ask for so many tokens with a prompt of so many; return what is wrong with the answer."""
        known = int(self.registry.file(instance).shape["vocab_size"])
        question = {
            "prompt": [random.randrange(300, known) for _token in range(length)],
            "n_predict": answer,
            "id_slot": slot,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"http://{self.servers[instance['name']].address}:{PORT}/completion",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.prompt_seconds) as stream:
                found = json.load(stream)
        except TimeoutError:
            return f"did not answer within {self.prompt_seconds:.0f} s"
        except urllib.error.HTTPError as error:
            return f"answered {error.code}: {error.read()[:200]!r}"
        except OSError as error:
            return f"did not answer: {error}"
        if (found["tokens_evaluated"], found["tokens_predicted"]) == (length, answer) and found["content"]:
            return ""
        return (
            f"read {found['tokens_evaluated']} of {length} tokens and wrote {found['tokens_predicted']} of {answer}: "
            f"{found['content']!r}"
        )

    def _again(self) -> None:
        """Start those again that take more of a GPU while they load: at first the others were not there yet."""
        for instance in self.registry.instances:
            if any(part["kind"] == "staging" for part in instance["parts"]) and not self._fallen():
                container = self.servers[instance["name"]]
                for device in instance["devices"]:
                    users = self._users(instance["node"], device)
                    gpu = self.devices[instance["node"], device]
                    # The process behind an emulated GPU ends with the connection, and with it what it has kept.
                    gpu.end(f"--port\0{FIRST_ENDPOINT + users.index(instance['name'])}\0")
                    self._wait(functools.partial(_listens, gpu, len(users)))
                container.restart()
                if not self._wait(functools.partial(_healthy, container)) and not self._fallen():
                    self.outcome.problems.append(f"{instance['name']} was not healthy again")

    def _measure(self, containers: Iterable[tuple[tuple[str, str], Container]]) -> None:
        for key, container in containers:
            if key in self.devices:
                # It reads no model: the kernel's own mark of the most that was in use is exact.
                with contextlib.suppress(OSError):
                    most = int((container.group / "memory.max_usage_in_bytes").read_text())
                    container.samples.append((most - _numbers(container.group / "memory.stat")["cache"]) / MIB)
            self.outcome.taken[key] = container.taken()

    def _look(self) -> None:
        """Say who fell, and fill in the peaks."""
        for key, container in self._containers():
            container.sample()
            problem = container.problem()
            if problem:
                self.outcome.problems.insert(0, f"{' '.join(key)} {problem}")
            if key in self.outcome.taken:
                self.outcome.taken[key].kept = max(container.samples, default=0.0)
            self.outcome.logs[" ".join(key)] = container.log()

    def _containers(self) -> Iterator[tuple[tuple[str, str], Container]]:
        with self._lock:
            devices = dict(self.devices)
        yield from self._servers()
        yield from devices.items()

    def _servers(self) -> Iterator[tuple[tuple[str, str], Container]]:
        with self._lock:
            servers = dict(self.servers)
        for name, container in servers.items():
            yield (name, "host"), container

    def _sample(self) -> None:
        for number in itertools.count():
            if self._over.wait(1 / HERTZ):
                return
            for _key, container in self._containers():
                container.sample()
                if number % LOOK_EVERY == 0:
                    container.look()


def _healthy(container: Container) -> bool:
    url = f"http://{container.address}:{PORT}/health"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _listens(container: Container, ports: int) -> bool:
    """Whether so many ports are open in it; looked up, since a connection would count as a client."""
    for process in container.processes()[:1]:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]
            return sum(line.split()[3] == "0A" for line in lines) >= ports
    return False
