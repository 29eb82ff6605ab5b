# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the planner calls fitting runs: random registries are planned, and the plans executed within their budgets.

    python3 tests/fitting/run.py [--registries 60] [--seed 7] [--json results.json]

Every server and every emulated GPU is a container whose memory limit is the planned number. All servers of a registry
run together, and each of their slots gets a prompt of nearly full context at the same time. Then the same at 0.9 of the
budgets, where at least half of the registries have to fail, else the budgets would be padding: somebody is killed or
does not answer, or a server reads its files from the disk over and over, since their pages do not stay.

Needs Docker with cgroup v1 and the image homelab-inference/llama.cpp:dev (tests/images/llama.cpp/build), root, 4 GiB of
disk and as much memory, PyPI gguf and numpy, ansible-core. Takes about half a minute for each registry on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / ".cache")]

from tests.fitting import files, registries  # noqa: E402
from tests.fitting.execute import CGROUPS, IMAGE, Execution, Outcome, Taken  # noqa: E402
from tests.fitting.registries import Registry  # noqa: E402

GIB = 1 << 30
CONTROL = 0.9  # of the budgets
# Times what it took with all of the budget, and seconds that it may take at least.
CONTROL_PATIENCE, LEAST_PATIENCE = 3, 60
# So many times more than it has there does a server read from the disk that has to fetch its own files again and again.
AGAIN = 2
MEDIAN_OVER, MOST_OVER, MOST_OVER_MIB = 1.05, 1.15, 48


def row(cells: list[object]) -> str:
    widths = (4, 4, 34, 10, 9, 22, 22, 6)
    return " ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths)).rstrip()


def ratios(outcome: Outcome) -> list[tuple[Taken, float, float]]:
    """Of each budget what was taken, planned over peak, and MiB over the peak."""
    return [(one, one.planned / one.peak, one.planned - one.peak) for one in outcome.taken.values() if one.peak]


def within(over: float, mib: float) -> bool:
    return over <= MOST_OVER or mib <= MOST_OVER_MIB


def describe(registry: Registry) -> list[str]:
    lines = []
    for one in registry.instances:
        options = one["server_options"]
        file = registry.file(one)
        budget = ", ".join(f"{where} {size} MiB" for where, size in one["memory"].items())
        lines.append(
            f"    {one['node']} {one['name']} {file.quant} ({file.size / files.MIB:.0f} MiB), "
            f"{options['parallel']} x {options['ctx-size'] // options['parallel']} tokens "
            f"{options['cache-type-k']}, {one['fit']}: {budget}"
        )
    return lines


def execute(registry: Registry, control: bool, quiet: bool) -> tuple[Outcome, Outcome | None]:
    outcome = Execution(registry).run()
    for line in [] if quiet else describe(registry):
        print(line)
    for key, taken in () if quiet else outcome.taken.items():
        over = taken.planned / taken.peak if taken.peak else 0.0
        print(
            f"      {' '.join(key)}: planned {taken.planned}, took {taken.peak:.0f} MiB "
            f"({taken.kept:.0f} kept, {taken.program:.0f} program, {taken.model:.0f} of the file"
            f"{f', read {taken.read:.0f}' if reads_again(taken) else ''}), "
            f"{over:.3f}{'' if within(over, taken.planned - taken.peak) else ' TOO MUCH'}"
        )
    for problem in outcome.problems:
        print(f"      DOES NOT HOLD: {problem}")
    for name, log in outcome.logs.items() if outcome.problems else ():
        print(*(f"        {name}: {line}" for line in log.splitlines()[-4:]), sep="\n")
    second = None
    if control:
        second = Execution(registry, CONTROL, prompt_seconds=patience(outcome)).run()
        print(f"      at {CONTROL}: {'; '.join(end(outcome, second)) or 'runs all the same'}", flush=True)
    return outcome, second


def patience(outcome: Outcome) -> float:
    return max(CONTROL_PATIENCE * outcome.seconds, LEAST_PATIENCE)


def reads_again(taken: Taken) -> bool:
    """Whether a server fetches its own files from the disk again and again."""
    return taken.read > (1 + AGAIN) * (taken.model + taken.program)


def end(outcome: Outcome, control: Outcome) -> list[str]:
    """How a registry fails with less than its budget; nothing when it runs all the same."""
    if control.problems:
        return control.problems[:1]
    return [
        f"{key[0]} reads its files again and again: {less.read:.0f} MiB instead of {outcome.taken[key].read:.0f}"
        for key, less in control.taken.items()
        if reads_again(less) and not reads_again(outcome.taken[key])
    ]


def verdict(done: list[tuple[Registry, Outcome, Outcome | None]]) -> list[tuple[str, str, str, bool]]:
    """Criterion, measured, target, and whether it is met."""
    over = [one for _registry, outcome, _control in done for one in ratios(outcome)]
    held = sum(not outcome.problems for _registry, outcome, _control in done)
    killed = sum(any("killed" in text for text in outcome.problems) for _registry, outcome, _control in done)
    emulated = sum(registry.emulated for registry, _outcome, _control in done)
    median = statistics.median(ratio for _taken, ratio, _mib in over) if over else 0.0
    loose = [one for one in over if not within(one[1], one[2])]
    least = min((one[1] for one in over), default=0.0)
    lines = [
        ("registries whose plan holds", f"{held} of {len(done)}", "all", held == len(done)),
        ("registries with something killed", str(killed), "0", not killed),
        (
            "planned over peak, median",
            f"{median:.3f} of {len(over)} budgets",
            f"<= {MEDIAN_OVER}",
            median <= MEDIAN_OVER,
        ),
        ("  more than 1.15 and 48 MiB over", str(len(loose)), "0", not loose),
        (
            "  most",
            f"{max((one[1] for one in over), default=0):.3f}, {max((one[2] for one in over), default=0):.0f} MiB",
            "",
            True,
        ),
        ("  least", f"{least:.3f}", "", True),
        ("  servers that read their files again", str(sum(reads_again(one[0]) for one in over)), "", True),
        ("registries with emulated GPUs", f"{emulated} of {len(done)}", "half", 2 * emulated >= len(done) - 1),
    ]
    controls = [(outcome, control) for _registry, outcome, control in done if control]
    if controls:
        failed = sum(bool(end(*both)) for both in controls)
        dead = sum(bool(control.problems) for _outcome, control in controls)
        lines.append(
            (
                f"registries that fail at {CONTROL} of the budget",
                f"{failed} of {len(controls)} ({dead} die)",
                "half",
                2 * failed >= len(controls),
            )
        )
    return lines


def _stop(_number: int, _frame: object) -> None:
    """End in order, and let nothing interrupt that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registries", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--files", type=int, default=14, help="models to make (default 14)")
    parser.add_argument("--work", type=float, default=40.0, help="10^9 operations that a server's prompts may take")
    parser.add_argument("--folder", type=Path, default=None, help="where the models are put")
    parser.add_argument("--only", type=int, default=None, help="this registry alone")
    parser.add_argument("--no-control", action="store_true", help="not again at 0.9 of the budget")
    parser.add_argument("--quiet", action="store_true", help="of each registry only what went wrong")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers there")
    options = parser.parse_args()
    if not CGROUPS.is_dir():
        print(f"The memory of containers cannot be read: {CGROUPS} is missing. Use a machine with cgroup v1.")
        return 2
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, _stop)
    seed = Random().randrange(10**6) if options.seed is None else options.seed
    work = options.work * 1e9
    print(f"seed {seed}, image {IMAGE}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="fitting-", dir=options.folder))
    done: list[tuple[Registry, Outcome, Outcome | None]] = []
    began = time.monotonic()
    try:
        random = Random(seed)
        pool = []
        for file in files.pool(random, folder, options.files, work):
            pool.append(file)
            print(f"made {file.name} {file.quant}, {file.size / files.MIB:.0f} MiB", flush=True)
        print(f"{len(pool)} files, {sum(file.size for file in pool) / GIB:.1f} GiB", flush=True)
        for number in range(options.registries):
            # Each from a seed of its own: --only draws the same one.
            registry = registries.draw(Random(f"{seed} {number}"), number, pool, bool(number % 2), work)
            if options.only not in (None, number):
                continue
            print(f"{time.monotonic() - began:5.0f} s  registry {number}", flush=True)
            done.append((registry, *execute(registry, not options.no_control, options.quiet)))
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        shutil.rmtree(folder)
    print()
    print(row(["no", "gpus", "servers", "planned", "holds", "over peak", "", f"at {CONTROL}"]))
    for registry, outcome, control in done:
        over = [one[1] for one in ratios(outcome)]
        print(
            row(
                [
                    registry.number,
                    "yes" if registry.emulated else "no",
                    " ".join(one["fit"] for one in registry.instances),
                    f"{sum(registry.budgets().values())} MiB",
                    "NO" if outcome.problems else "yes",
                    f"{min(over):.3f} to {max(over):.3f}" if over else "-",
                    f"{outcome.seconds:.0f} s",
                    "-"
                    if control is None
                    else "dies"
                    if control.problems
                    else "reads"
                    if end(outcome, control)
                    else "runs",
                ]
            )
        )
    print()
    lines = verdict(done)
    for name, measured, target, met in lines:
        print(f"{name:<44} {measured:<28} {target:<8} {'' if not target else 'ok' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "seed": seed,
                    "registries": [
                        {
                            "number": registry.number,
                            "instances": registry.instances,
                            "taken": {" ".join(key): asdict(one) for key, one in outcome.taken.items()},
                            "problems": outcome.problems,
                            "control": end(outcome, control) if control else None,
                        }
                        for registry, outcome, control in done
                    ],
                },
                indent=1,
            )
        )
    return 0 if done and all(met for *_line, met in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
