# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a llama-server's log says of the memory it takes. Pure: text in, MiB out.

Two passes can be read. The real load: its lines are there from C(--verbosity 4) on. The dry pass that C(--fit on)
makes before it: everything is laid out, nothing is allocated; its lines are there from C(--verbosity 5) on.

A line that should be there and is not, or that is there and cannot be read, is an error and never a zero.
"""

from __future__ import annotations

import re

HOST = "CPU"
DRY_STARTS = "getting device memory data for initial parameters"
TABLE = "memory breakdown [MiB]"

# "sched_reserve: RPC0[127.0.0.1:50052] compute buffer size =   244.05 MiB"
BUFFER = re.compile(r"(\w+): +(\S+) +(\w[\w ]*?) +buffer size += +(\d+\.\d+) MiB$")
# Other things said of buffers, which are no sizes of their own.
ASIDE = re.compile(r"buffer size (?:is|of) +\d")
KINDS = {"model": "model", "KV": "kv", "RS": "recurrent", "output": "output", "compute": "compute", "LoRA": "lora"}
STATE = re.compile(r"^DSV4 \w+ state$")
EXPERT_CACHE = re.compile(r": +(\S+) +MoE cache size += +(\d+\.\d+) MiB")
ROW = re.compile(r"\| +- (\S+)(?: \([^|]*\))? *\|[^|=]*=(.*)\|$")
CELLS = re.compile(r": size += +(\d+\.\d+) MiB \( *\d+ cells, +(\d+) layers,.*\), K \(")
LAYER = re.compile(r"kv_cache\w*: layer +\d+: dev = (\S+)")
DEVICE = re.compile(r"using device (\S+) \((\S+)\)")
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


class LlamaLogError(Exception):
    """The log does not say what it should; the message is a sentence and what to do."""


def buffers(text: str) -> dict[str, dict[str, float]]:
    """What the server took, in MiB: C({"CUDA0": {"model": 4096.0, ...}, "CPU": {...}}).

    Kinds: model, repack (weights kept twice for the processor), kv, recurrent, output, compute, lora, moe_cache,
    projector; those not named are not there. C(CPU) holds everything in the host's memory, pinned buffers too.
    """
    return _Pass(_after_fit(text), dry=False, whole=text).result()


def dry_buffers(text: str) -> dict[str, dict[str, float]]:
    """What the server would take, by the first dry pass in the log: as P(buffers) says it.

    Compute and output are exact to 0.01 MiB, kv too where a cache's layers are of one size; model and repack are whole
    MiB, rounded down.
    """
    start = text.find(DRY_STARTS)
    if start < 0:
        raise LlamaLogError("Cannot find the dry pass in the log. Start llama-server with --fit on --verbosity 5.")
    lines = text[start:].splitlines()
    table = next((index for index, line in enumerate(lines) if TABLE in line), None)
    if table is None:
        raise LlamaLogError(f"The dry pass ended without its table.{_reason(lines)}")
    end = table + 1
    while end < len(lines) and _message(lines[end]).startswith("|"):
        end += 1
    if end == len(lines):
        raise LlamaLogError("The log ends inside the table of the dry pass. Read on until the table is whole.")
    return _Pass(lines[:end], dry=True, whole=text).result()


def offloaded(text: str) -> tuple[int, int]:
    """Layers on devices and layers in all, the output counted as one, of the last load or dry pass in the log."""
    found = OFFLOADED.findall(text)
    if not found:
        raise LlamaLogError(
            "The log does not say how many layers were offloaded. Start llama-server with --verbosity 4."
        )
    return int(found[-1][0]), int(found[-1][1])


def _message(line: str) -> str:
    """A line without its time stamp and the name of the function that printed it."""
    return line.partition("print: ")[2]


def _reason(lines: list[str]) -> str:
    """The last line that names an error, as a sentence to put behind another."""
    named = [line for line in lines if re.search(r"\b(?:E|error|failed)\b", line)]
    return f" It last said: {named[-1].strip()[-300:]}" if named else " Start llama-server with --verbosity 5."


def _after_fit(text: str) -> list[str]:
    """The lines of the last real load."""
    lines = text.splitlines()
    start = next((index for index in reversed(range(len(lines))) if "load_model: loading model '" in lines[index]), 0)
    fits = [index for index in range(start, len(lines)) if "fitting params to" in lines[index]]
    if fits:
        start = fits[-1]
    if not any("loading model tensors" in line for line in lines[start:]):
        raise LlamaLogError(f"Cannot find the loading of a model in the log.{_reason(lines)}")
    return lines[start:]


class _Pass:
    """The buffers of one pass, summed up."""

    def __init__(self, lines: list[str], dry: bool, whole: str) -> None:
        self._lines, self._dry = lines, dry
        # "RPC1 (127.0.0.1:50053)": buffers of RPC servers carry the address and the number on their own server.
        self._names = {address: name for name, address in DEVICE.findall(whole)}
        self._sizes: dict[str, dict[str, float]] = {}
        self._seen: set[str] = set()

    def _device(self, name: str) -> str:
        """The device that a buffer lies on."""
        plain, _bracket, address = name.partition("[")
        if address:
            return self._names.get(address.rstrip("]"), plain)
        if re.match(r"^(?:CPU|AMX|BLAS)(?:_\w+)?$", plain) or plain.endswith("_Host"):
            return HOST
        return re.sub(r"_(?:Mapped|Private|Shared)$", "", plain)

    def _add(self, device: str, kind: str, mib: float) -> None:
        sizes = self._sizes.setdefault(device, {})
        sizes[kind] = round(sizes.get(kind, 0.0) + mib, 2)

    def result(self) -> dict[str, dict[str, float]]:
        caches: list[tuple[dict[str, int], float, int]] = []
        layers: dict[str, int] = {}
        for line in self._lines:
            layer = LAYER.search(line)
            if layer:
                layers[self._device(layer[1])] = layers.get(self._device(layer[1]), 0) + 1
                continue
            cells = CELLS.search(line)
            if cells:
                caches.append((layers, float(cells[1]), int(cells[2])))
                layers = {}
                continue
            cache = EXPERT_CACHE.search(line)
            if cache:
                self._add(self._device(cache[1]), "moe_cache", float(cache[2]))
            elif "buffer size" in line and not ASIDE.search(line):
                self._buffer(line)
        for kind in ("model", "compute", "output"):
            if kind not in self._seen:
                raise LlamaLogError(
                    f"The log has no line for the {kind} buffer. "
                    f"Start llama-server with --verbosity {5 if self._dry else 4}.{_reason(self._lines)}"
                )
        if self._dry:
            self._from_table(caches)
        else:
            self._check(caches)
        return self._sizes

    def _buffer(self, line: str) -> None:
        match = BUFFER.search(line.rstrip())
        if not match:
            raise LlamaLogError(f"Cannot read {line.strip()[-200:]!r} in the log. Tell the version of llama.cpp.")
        function, name, words, mib = match[1], match[2], match[3], float(match[4])
        kind = "recurrent" if STATE.match(words) else KINDS.get(words)
        if kind is None:
            raise LlamaLogError(f"The log has a buffer of unknown kind: {line.strip()[-200:]!r}. Tell the version.")
        if kind == "compute" and function != "sched_reserve":
            kind = "projector"
        elif kind == "model" and name in ("CPU_REPACK", "AMX"):
            kind = "repack"
            self._seen.add("model")
        self._seen.add(kind)
        # The dry pass gives model and kv as 0.00; its table has them.
        if not (self._dry and kind in ("model", "repack", "kv")):
            self._add(self._device(name), kind, mib)

    def _check(self, caches: list[tuple[dict[str, int], float, int]]) -> None:
        total = sum(size for _layers, size, _count in caches)
        kept = sum(sizes.get("kv", 0.0) for sizes in self._sizes.values())
        if abs(total - kept) > 0.02 * (1 + len(caches) * len(self._sizes)):
            raise LlamaLogError(
                f"The log contradicts itself: caches of {total:.2f} MiB in buffers of {kept:.2f} MiB. Tell the version."
            )

    def _from_table(self, caches: list[tuple[dict[str, int], float, int]]) -> None:
        rows = [line for line in self._lines if _message(line).startswith("|   -")]
        context: dict[str, int] = {}
        for line in rows:
            match = ROW.search(line.rstrip())
            numbers = [int(number) for number in re.findall(r"\d+", match[2].split("=")[-1])] if match else []
            if not match or len(numbers) < 3:
                raise LlamaLogError(f"Cannot read {line.strip()[-200:]!r} in the log. Tell the version of llama.cpp.")
            model, kept, compute = numbers[:3]
            name = match[1]
            device = HOST if name == "Host" else self._device(name)
            self._add(device, "repack" if name in ("CPU_REPACK", "AMX") else "model", model)
            context[device] = context.get(device, 0) + kept
            if name == "Host" or device != HOST:
                self._compare(device, compute)
        if not rows:
            raise LlamaLogError("The table of the dry pass is empty. Tell the version of llama.cpp.")
        exact: dict[str, float] = {}
        for layers, size, count in caches:
            for device, number in layers.items():
                exact[device] = exact.get(device, 0.0) + size * number / max(count, 1)
        for device, kept in context.items():
            rest = kept - self._sizes[device].get("recurrent", 0.0)
            precise = exact.get(device, 0.0)
            # The table rounds down. Layers of different sizes cannot be told apart by their number.
            kv = precise if -1 <= precise - rest <= 2 else max(rest, 0.0)
            if kv > 0:
                self._add(device, "kv", kv)

    def _compare(self, device: str, table: int) -> None:
        line = self._sizes[device].get("compute", 0.0)
        if abs(line - table) > 1:
            raise LlamaLogError(
                f"The log contradicts itself: compute buffer of {device}: {line} MiB in its line and {table} MiB "
                "in the table. Tell the version."
            )


def of_instance(sizes: dict[str, dict[str, float]], devices: list[str]) -> dict[str, dict[str, float]]:
    """The same by the lab's names: the server's first device is the first of C(devices), CPU is C(host)."""
    names = {HOST: "host"}
    others = sorted(
        (name for name in sizes if name != HOST), key=lambda name: [int(n) for n in re.findall(r"\d+", name)]
    )
    if len(others) > len(devices):
        raise LlamaLogError(
            f"The server used {', '.join(others)}, more than its {len(devices)} devices. Restart it with --device."
        )
    for name in others:
        number = re.search(r"(\d+)$", name)
        index = int(number[1]) if number else 0
        if index >= len(devices):
            raise LlamaLogError(f"The server used {name}, which it was not given. Restart it with --device.")
        names[name] = devices[index]
    return {names[name]: kinds for name, kinds in sizes.items()}
