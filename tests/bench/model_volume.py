# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast a model gets into a volume, beside the usual ways. Needs root, Docker and twice the size on the disk.

Every run starts with a cold cache. The ways take turns, so that other work on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".cache"))

from ansible_collections.homelab.inference.plugins.module_utils.model_files import Store, Wanted  # noqa: E402

VOLUME = "homelab-inference-bench"
MIB = 1 << 20


def shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def timed(way: Callable[[], None], target: Path) -> float:
    for left in target.iterdir():
        left.unlink()
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    begin = time.monotonic()
    way()
    return time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=4.0, help="GiB (default 4)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--image", default="homelab-inference/llama.cpp:dev", help="any image that has cp")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where the source file is put")
    options = parser.parse_args()

    folder = options.folder / f"model-volume-bench-{os.getpid()}"
    source = folder / "model.gguf"
    size = int(options.size * 1024) * MIB
    folder.mkdir()
    try:
        with source.open("wb") as handle:
            for _index in range(size // MIB // 16):
                handle.write(os.urandom(16 * MIB))
            os.fsync(handle.fileno())
        shell(f"docker volume create {VOLUME}")
        inspected = ["docker", "volume", "inspect", "-f", "{{.Mountpoint}}", VOLUME]
        target = Path(subprocess.run(inspected, check=True, capture_output=True, text=True).stdout.strip())
        copy = f"cp {source} {target}/model.gguf && sync {target}/model.gguf"
        container = (
            f"docker run --rm --entrypoint cp -v {folder}:/in:ro -v {VOLUME}:/out {options.image} /in/model.gguf /out/"
        )
        ways: dict[str, Callable[[], None]] = {
            "model_volume": lambda: Store(str(target)).fetch(Wanted("model.gguf", "path", str(source))),
            "cp && sync": lambda: shell(copy),
            "cp && sync && sha256sum": lambda: shell(f"{copy} && sha256sum {target}/model.gguf"),
            "docker run … cp && sync": lambda: shell(f"{container} && sync {target}/model.gguf"),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _run in range(options.runs):
            for name, way in ways.items():
                times[name].append(timed(way, target))
    finally:
        shutil.rmtree(folder)
        subprocess.run(["docker", "volume", "rm", "-f", VOLUME], check=False, stdout=subprocess.DEVNULL)

    ours = statistics.median(times["model_volume"])
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{size / (1 << 30):.1f} GiB, cold cache, {options.runs} runs, {os.cpu_count()} cores, load {load}")
    print(f"{'way':26} {'median':>8} {'least':>8} {'most':>8} {'MiB/s':>7} {'ratio':>6}")
    for name, taken in times.items():
        middle = statistics.median(taken)
        least_most = f"{min(taken):7.2f}s {max(taken):7.2f}s"
        print(f"{name:26} {middle:7.2f}s {least_most} {size / MIB / middle:7.0f} {middle / ours:6.2f}")
    targets = {"cp && sync && sha256sum": 1.0, "cp && sync": 0.5}
    missed = [name for name, least in targets.items() if statistics.median(times[name]) / ours < least]
    print("missed against " + ", ".join(missed) if missed else "targets met: 1.0 with sha256sum, 0.5 without")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
