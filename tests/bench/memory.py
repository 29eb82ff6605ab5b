# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server takes on each device: predicted from the header, beside the engine's own words and gguf-parser-go.

    python3 tests/bench/memory.py [--cases N] [MODEL...]

Needs Docker and the image that tests/images/llama.cpp/build makes. gguf-parser-go is built from its published module
where Go and its proxy can be reached; else its column is missing and the last line says why. Experts on the processor
are left out of its column: it wants the tensors' names for that. The truth is the dry pass: weights and caches are
rounded down to whole MiB there, so that errors of less than one MiB in them count as none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
VERSION = "v0.25.0"
MODULE = "github.com/gpustack/gguf-parser-go"
KINDS = ("weights", "kv", "compute", "total")

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models"), str(ROOT / "tests" / "oracle")]


def other(folder: Path) -> tuple[Path | None, str]:
    """gguf-parser-go, or why it is not there."""
    go = shutil.which("go")
    if not go:
        return None, "no go on PATH"
    shutil.copy(Path(__file__).parent / "gguf_parser" / "main.go", folder)
    environment = {**os.environ, "GOFLAGS": "-mod=mod", "GOPATH": str(folder / "path")}
    error = ""
    for command in (["mod", "init", "bench"], ["get", f"{MODULE}@{VERSION}"], ["build", "-o", "bench", "."]):
        for _attempt in range(3):
            done = subprocess.run(
                [go, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            error = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
            if not done.returncode:
                break
        else:
            return None, f"go {command[0]}: {error}"
    return folder / "bench", ""


def cases(name: str, shape: dict[str, Any], count: int) -> list[tuple[int, dict[str, Any]]]:
    """A sample of everything that a model can be started with."""
    import record

    half = shape["block_count"] // 2
    places = [*record.places(shape), (1, {"n-gpu-layers": 1}), (1, {"n-gpu-layers": half + 2})]
    found = []
    chance = random.Random(f"bench {name}")
    while len(found) < count:
        devices, where = chance.choice(places)
        flash = chance.choice(["on", "on", "on", "off"])
        kv = chance.choice(["f16", "q8_0", "q4_0"]) if flash == "on" else "f16"
        slots = chance.choice([{"parallel": 1}, {"parallel": 4}, {"parallel": 4, "kv-unified": True}])
        found.append(
            (
                devices,
                {
                    "ctx-size": chance.choice([4096, 8192, 16384, 32768, 65536]),
                    "ubatch-size": chance.choice([256, 512, 512, 1024, 2048]),
                    "flash-attn": flash,
                    "cache-type-k": kv,
                    "cache-type-v": kv,
                    **slots,
                    **where,
                },
            )
        )
    return found


def ours(shape: dict[str, Any], options: dict[str, Any], count: int) -> dict[str, dict[str, float]]:
    """MiB by place and kind."""
    from ansible_collections.homelab.inference.plugins.module_utils.memory.cache import cache
    from ansible_collections.homelab.inference.plugins.module_utils.memory.compute import compute
    from ansible_collections.homelab.inference.plugins.module_utils.memory.weights import weights

    devices = [{"id": f"gpu{index}", "vendor": "emulated", "memory_mib": 24576} for index in range(count)]
    if shape["pooling"]:
        options = {**options, "embedding": True}
    found: dict[str, dict[str, float]] = {}
    parts = weights(shape, options, devices) + cache(shape, options, devices)
    for part in parts + compute(shape, options, devices, "emulated"):
        kind = {"recurrent": "kv", "output": "compute"}.get(part["kind"], part["kind"])
        sizes = found.setdefault(part["where"], dict.fromkeys(KINDS, 0.0))
        if kind in KINDS:
            sizes[kind] += part["bytes"] / MIB
            sizes["total"] += part["bytes"] / MIB
    return found


def theirs(program: Path, questions: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """What gguf-parser-go says of each question, the processor first."""
    text = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    answers = []
    for line in done.stdout.splitlines():
        devices = [{kind: size / MIB for kind, size in device.items()} for device in json.loads(line)]
        for device in devices:
            device["total"] = sum(device.values())
        answers.append(devices)
    return answers


def question(path: Path, shape: dict[str, Any], options: dict[str, Any], devices: int) -> dict[str, Any]:
    """A case in gguf-parser-go's words."""
    layers = options.get("n-gpu-layers", 0) if devices else 0
    return {
        "Path": str(path),
        "Context": options["ctx-size"],
        "Batch": max(2048, options["ubatch-size"]),
        "Ubatch": options["ubatch-size"],
        "Parallel": options["parallel"],
        "Flash": options["flash-attn"] == "on",
        "Key": options["cache-type-k"],
        "Value": options["cache-type-v"],
        "Layers": shape["block_count"] + 1 if layers == "all" else layers,
        "Split": [(index + 1) / devices for index in range(devices)],
    }


class Score:
    """Errors of one predictor, by kind of buffer."""

    def __init__(self) -> None:
        self._errors: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, said: float, taken: float) -> None:
        error = said - taken
        if kind != "compute":  # the truth is rounded down
            error = min(error, 0.0) if error <= 0 else max(0.0, error - (2.0 if kind == "total" else 1.0))
        self._errors[kind].append((error, taken))

    def line(self, kind: str) -> str:
        """Median, 95th percentile, largest, and those that are too small."""
        found = self._errors[kind]
        shares = sorted(abs(error) / max(taken, 1.0) * 100 for error, taken in found)
        under = [error for error, taken in found if error < -max(1.0, 0.005 * taken)]
        worst = min((error for error, _taken in found), default=0.0)
        return (
            f"{len(found):5} {statistics.median(shares):8.2f} {shares[int(len(shares) * 0.95)]:8.2f} {shares[-1]:8.2f}"
            f" {len(under):6} {worst:10.1f}"
        )


def taken(answer: dict[str, dict[str, float]], place: str) -> dict[str, float]:
    """MiB by kind on one device."""
    sizes = answer[place]
    found = {
        "weights": sizes.get("model", 0.0),
        "kv": sizes.get("kv", 0.0) + sizes.get("recurrent", 0.0),
        "compute": sizes.get("compute", 0.0) + sizes.get("output", 0.0),
    }
    return {**found, "total": sum(found.values())}


def main() -> int:
    """Ask, predict, compare, print."""
    import conftest

    conftest.pytest_configure()
    import record
    import synthetic
    from ansible_collections.homelab.inference.plugins.module_utils import gguf

    from tests.oracle.oracle import Case, Oracle, OracleError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12, help="per model")
    parser.add_argument("models", nargs="*", default=[*record.LOOKED_AT, *record.UNSEEN])
    arguments = parser.parse_args()
    scores = {"homelab.inference": Score(), "gguf-parser-go": Score()}
    host = Score()
    failed = 0
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "go").mkdir()
        program, reason = other(folder / "go")
        for name in arguments.models:
            path = synthetic.model(name, synthetic.MODELS[name].quants[0], folder)
            shape = gguf.shape([gguf.read_file(path)])
            rows = cases(name, shape, arguments.cases)
            with Oracle(folder) as oracle:
                answers = oracle.ask_all([Case(path, given, count, record.mode(shape)) for count, given in rows])
            said = theirs(program, [question(path, shape, given, count) for count, given in rows]) if program else []
            for index, ((count, given), answer) in enumerate(zip(rows, answers)):
                if isinstance(answer, OracleError):
                    failed += 1
                    print(f"{name} {count} {given}: {str(answer)[:200]}", file=sys.stderr)
                    continue
                expected = ours(shape, given, count)
                for place in answer:
                    truth = taken(answer, place)
                    for kind in KINDS:
                        if place == "host":
                            if kind != "total":
                                host.add(kind, expected.get(place, {}).get(kind, 0.0), truth[kind])
                            continue
                        scores["homelab.inference"].add(kind, expected.get(place, {}).get(kind, 0.0), truth[kind])
                        if said and not given.get("cpu-moe") and not given.get("n-cpu-moe"):
                            devices = said[index]
                            there = devices[1 + int(place[3:])] if len(devices) > 1 + int(place[3:]) else {}
                            scores["gguf-parser-go"].add(kind, there.get(kind, 0.0), truth[kind])
            path.unlink()
            print(f"{name}: {len(rows)} cases", file=sys.stderr, flush=True)
    title = f"{'':30} {'n':>5} {'median %':>8} {'p95 %':>8} {'max %':>8} {'under':>6} {'worst MiB':>10}"
    print(title)
    for kind in KINDS:
        for predictor, score in scores.items():
            if predictor == "homelab.inference" or program:
                print(f"{kind + ' per GPU':16} {predictor:17}{score.line(kind)}"[:120])
    for kind in ("compute",):
        print(f"{kind + ' on the host':16} {'homelab.inference':17}{host.line(kind)}")
    print(f"gguf-parser-go {VERSION}" + ("" if program else f" is not here: {reason}"))
    print("under: more than 0.5 % and 1 MiB below the engine")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
