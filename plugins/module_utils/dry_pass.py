# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asking an image's llama-server how much memory it would take. Pure: commands and logs, nothing is run here.

With C(--fit on) the server lays everything out before it loads anything; it is stopped when it has said how much that
is. So a file whose tensors are a hole will do, and no GPU is needed: ggml-rpc-servers beside it stand for devices.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ansible_collections.homelab.inference.plugins.module_utils import llama_log, llama_server

PORT = 50052
# The table is whole when a line follows it.
DRY = "fit_impl: projected\\|fitting params to free"
LOADED = "model loaded\\|exiting due to"

# Reads cases, each a line NUMBER DEVICES LAST ARGUMENTS..., and prints what its server says until a line matches LAST.
DRIVER = r"""
noise='graph_reserve\|input_tensors\|create_tensor\|load_tensors: layer\|model_loader\|print_info'
mkfifo /tmp/log
program=/app/llama-server
[ -x $program ] || program=llama-server
# A client that was killed may take its device along: each case has new ones.
start_devices() {
    n=0
    while [ $n -lt "$1" ]; do
        ggml-rpc-server -H 127.0.0.1 -p $((50052 + n)) >/dev/null 2>&1 &
        devices="$devices $!"
        n=$((n + 1))
    done
    tries=0
    while [ $n -gt 0 ]; do # it listens when the kernel knows its port
        hex=$(printf '0100007F:%04X 00000000:0000 0A' $((50051 + n)))
        if grep -q "$hex" /proc/net/tcp; then n=$((n - 1)); else sleep 0.01; fi
        tries=$((tries + 1))
        if [ $tries -gt 1000 ]; then echo "no ggml-rpc-server answers"; return; fi
    done
}
while IFS= read -r line; do
    eval "set -- $line"
    echo "=== case $1"
    devices='' last=$3
    start_devices "$2"
    shift 3
    $program "$@" >/tmp/log 2>&1 &
    server=$!
    sed "/$noise/d;/$last/q" </tmp/log
    kill -9 $server $devices 2>/dev/null
    wait $server $devices 2>/dev/null
done
exit 0
"""
MARK = "=== case "


def command(image: str, mounts: Mapping[str, str], more: tuple[str, ...] = ()) -> list[str]:
    """The command that answers cases on its standard input.

    :param mounts: where each file or folder lies under the models of the container; it only reads them.
    """
    volumes = [f"--volume={path}:{llama_server.MODELS}{'/' + name if name else ''}:ro" for path, name in mounts.items()]
    return [
        *("docker", "run", "--rm", "--interactive", "--network", "none", "--pull", "never", *more, *volumes),
        *("--entrypoint", "sh", image, "-c", DRIVER),
    ]


def case(number: int, file: str, options: Mapping[str, Any], devices: int, mode: str, load: bool = False) -> str:
    """One line of the input: the flags of production, but for those that make the server talk and stop."""
    argv = llama_server.arguments(instance(file, options, devices, mode))
    argv[argv.index("--fit") + 1] = "on"
    argv += ["--verbosity", "5"]
    return " ".join(shlex.quote(word) for word in (str(number), str(devices), LOADED if load else DRY, *argv))


def instance(file: str, options: Mapping[str, Any], devices: int, mode: str) -> dict[str, Any]:
    """The instance, as the lock has it, that a case stands for."""
    emulated = [
        {"id": f"gpu{index}", "vendor": "emulated", "endpoint": f"127.0.0.1:{PORT + index}"} for index in range(devices)
    ]
    return {
        "name": "dry-pass",
        "alias": "dry-pass",
        "model_file": file,
        "backend": "emulated" if devices else "cpu",
        "devices": emulated,
        "mode": mode,
        "port": 8080,
        "api_key_file": None,
        "cpus": None,
        "server_options": dict(options),
    }


def texts(output: str) -> list[str]:
    """The log of each case that was answered."""
    return output.split(MARK)[1:]


def buffers(text: str, devices: int, load: bool = False) -> dict[str, dict[str, float]]:
    """MiB by device and kind, as llama_log.py says it; the devices are gpu0 and so on, the rest is host."""
    read = llama_log.buffers if load else llama_log.dry_buffers
    return llama_log.of_instance(read(text), [f"gpu{index}" for index in range(devices)])
