# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The truth about memory: what the very llama-server of an image says that it takes.

    with Oracle(folder) as oracle:                      # one container, no network; folder is mounted read-only
        sizes = oracle.ask(folder / "m.gguf", {"ctx-size": 8192, "parallel": 1, "n-gpu-layers": "all"}, devices=1)
        sizes["gpu0"]["compute"], sizes["host"]["compute"]          # MiB
        answers = oracle.ask_all([Case(path, options, devices=2), ...])      # in order; a case that failed: OracleError

`ask` runs the server with the flags of production and `--fit on`, reads its dry pass (nothing is loaded, a file with
a hole in place of its tensors will do) and kills it: about 0.3 s a case. model and repack are whole MiB, rounded down.
`load=True` lets it load for real and reads those lines: 0.01 MiB everywhere, at the price of that memory; tensors may
be a hole. The devices are ggml-rpc-servers beside it, `gpu0` and so on, `host` is everything else.
Kinds: model, repack, kv, recurrent, output, compute (see llama_log.py); `Answer.text` is the log.
"""

from __future__ import annotations

import secrets
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import llama_log, llama_server

IMAGE = "homelab-inference/llama.cpp:dev"
PORT = 50052
SECONDS = 60  # a case may take
LIMIT = "12g"  # what the container may take, so that a mistake does not take the machine

# Reads cases, each a line NUMBER DEVICES LAST ARGUMENTS..., and prints what its server says until a line matches LAST.
DRIVER = r"""
noise='graph_reserve\|input_tensors\|create_tensor\|load_tensors: layer\|model_loader\|print_info'
mkfifo /tmp/log
# A client that was killed may take its device along: each case has new ones.
start_devices() {
    n=0
    while [ $n -lt "$1" ]; do
        ggml-rpc-server -H 127.0.0.1 -p $((50052 + n)) >/dev/null 2>&1 &
        devices="$devices $!"
        n=$((n + 1))
    done
    while [ $n -gt 0 ]; do # it listens when the kernel knows its port
        hex=$(printf '0100007F:%04X 00000000:0000 0A' $((50051 + n)))
        if grep -q "$hex" /proc/net/tcp; then n=$((n - 1)); else sleep 0.01; fi
    done
}
while IFS= read -r line; do
    eval "set -- $line"
    echo "=== case $1"
    devices='' last=$3
    start_devices "$2"
    shift 3
    llama-server "$@" >/tmp/log 2>&1 &
    server=$!
    sed "/$noise/d;/$last/q" </tmp/log
    kill -9 $server $devices 2>/dev/null
    wait $server $devices 2>/dev/null
done
exit 0
"""


class OracleError(Exception):
    """The server refused, or its log could not be read."""


class Answer(dict):
    """Buffers by device and kind, in MiB."""

    text = ""
    offloaded = (0, 0)


@dataclass(frozen=True)
class Case:
    """One question."""

    model: Path
    options: Mapping[str, Any]
    devices: int = 0
    mode: str = "chat"
    load: bool = False


class Oracle:
    """A container in which many servers are asked, one after the other."""

    def __init__(self, folder: Path, image: str = IMAGE) -> None:
        self._folder, self._image = Path(folder).resolve(), image
        self._name = f"oracle-{secrets.token_hex(4)}"

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_error: object) -> None:
        subprocess.run(["docker", "rm", "-f", self._name], capture_output=True, check=False)

    def ask(
        self, model: Path, options: Mapping[str, Any], devices: int = 0, mode: str = "chat", load: bool = False
    ) -> Answer:
        """One case."""
        answer = self.ask_all([Case(model, options, devices, mode, load)])[0]
        if isinstance(answer, OracleError):
            raise answer
        return answer

    def ask_all(self, cases: Iterable[Case]) -> list[Answer | OracleError]:
        """All cases in one container, the answers in the same order."""
        cases = list(cases)
        lines = [f"{number} {shlex.join(self._line(case))}" for number, case in enumerate(cases)]
        command = ["docker", "run", "--rm", "--interactive", "--network", "none", "--memory", LIMIT]
        command += ["--name", self._name, "--volume", f"{self._folder}:{llama_server.MODELS}:ro"]
        command += ["--entrypoint", "sh", self._image, "-c", DRIVER]
        done = subprocess.run(
            command,
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS * (1 + len(cases)),
            check=False,
        )
        if done.returncode:
            raise OracleError(f"The container ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        texts = done.stdout.split("=== case ")[1:]
        if len(texts) != len(cases):
            raise OracleError(f"{len(texts)} of {len(cases)} cases were answered: {done.stderr.strip()[-500:]}")
        return [self._answer(case, text) for case, text in zip(cases, texts)]

    def _line(self, case: Case) -> list[str]:
        file = Path(case.model).resolve().relative_to(self._folder)
        argv = llama_server.arguments(instance(case, str(file)))
        argv[argv.index("--fit") + 1] = "on"
        argv += ["--verbosity", "5"]
        # sed needs a line after the table to know that the table is whole.
        last = "model loaded\\|exiting due to" if case.load else "fit_impl: projected\\|fitting params to free"
        return [str(case.devices), last, *argv]

    def _answer(self, case: Case, text: str) -> Answer | OracleError:
        names = [f"gpu{index}" for index in range(case.devices)]
        try:
            read = llama_log.buffers if case.load else llama_log.dry_buffers
            answer = Answer(llama_log.of_instance(read(text), names))
            answer.offloaded = llama_log.offloaded(text)
        except llama_log.LlamaLogError as error:
            return OracleError(f"{case.model.name} {dict(case.options)}: {error}\n{text[-1500:]}")
        answer.text = text
        return answer


def instance(case: Case, file: str) -> dict[str, Any]:
    """The instance, as the lock has it, that a case stands for."""
    devices = [
        {"id": f"gpu{index}", "vendor": "emulated", "endpoint": f"127.0.0.1:{PORT + index}"}
        for index in range(case.devices)
    ]
    return {
        "name": "oracle",
        "alias": "oracle",
        "model_file": file,
        "backend": "emulated" if devices else "cpu",
        "devices": devices,
        "mode": case.mode,
        "port": 8080,
        "api_key_file": None,
        "cpus": None,
        "server_options": dict(case.options),
    }
