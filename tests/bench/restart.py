# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a request is lost while every model server of the box is restarted, again and again.

    python3 tests/bench/restart.py [--requests 5000] [--rounds 3] [--command "./lab restart"] [--models chat,code]
                                   [--fallback code=chat] [--inventory inventories/box]

Eight clients ask the gateway without a pause. First through a relay that cuts one stream on purpose: that has to be
counted, or the rest would prove nothing. Then in calm, which says how long an answer takes. Then the command is run
until the requests and the rounds are done. It ends with 1 when a request was lost.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from playbooks.files.ask import gateway  # noqa: E402
from tests.bench.load import Cutter, Load, Result, deadline, percentile  # noqa: E402

LOG = ROOT / ".cache" / "restart.log"
CALM_REQUESTS = 500
AROUND_CUT = 20
PATIENCE_S = 120
COMMAND_S = 1800
SHOWN = 20

Models = dict[str, set[str]]


def find_gateway(inventory: str) -> tuple[str, str]:
    """Return address and key, found as ./lab ask finds them; the key never is a word of a command."""
    command: list[str | Path] = [ROOT / ".cache" / "venv" / "bin" / "ansible-inventory", "-i", inventory, "--list"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    except FileNotFoundError as error:
        raise SystemExit(f"restart: {error.filename} is not there. Make the box first: ./lab up") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"restart: the inventory {inventory} cannot be read: {error.stderr.strip()}") from error
    url, key = gateway(json.loads(listed))
    return url.removesuffix("/v1/chat/completions"), key


def served(url: str, key: str) -> set[str]:
    """Return the models that the gateway has."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    # A proxy of the environment does not lead to the lab; the load does not ask it either.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=30) as answer:
            return {model["id"] for model in json.load(answer)["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"restart: {url}/v1/models is no gateway ({error}). Look with: ./lab status") from error


def choose(words: str, fallbacks: list[str], there: set[str]) -> Models:
    """Return for each model the names by which it may be answered."""
    models = {name: {name} for name in words.split(",") if name}
    if not models:
        raise SystemExit("restart: --models names no model.")
    for pair in fallbacks:
        name, _equals, other = pair.partition("=")
        if not name or not other:
            raise SystemExit(f"restart: --fallback {pair} is not of the form MODEL=FALLBACK.")
        if name in models:
            models[name].add(other)
    if missing := sorted(set(models) - there):
        known = ", ".join(sorted(there)) or "no model"
        raise SystemExit(f"restart: the gateway has no {', '.join(missing)}. It has {known}.")
    return models


def show_failures(result: Result) -> None:
    """Print the first failures."""
    for failure in result.failures[:SHOWN]:
        print(failure)
    if len(result.failures) > SHOWN:
        print(f"... and {len(result.failures) - SHOWN} more")


def self_test(url: str, key: str, models: Models) -> None:
    """Cut one stream; stop when the load did not count exactly that one."""
    with Cutter(url) as cutter:
        load = Load(cutter.url, key, models, patience_s=PATIENCE_S)
        load.start()
        until(load, AROUND_CUT)
        was_cut = cutter.cut()
        until(load, load.done + AROUND_CUT)
        result = load.stop()
    if not was_cut or len(result.failures) != 1 or not result.failures[0].streaming:
        show_failures(result)
        cut = "One stream was cut" if was_cut else "No stream was there to be cut"
        raise SystemExit(f"restart: the self-test failed. {cut}, and {len(result.failures)} requests count as failed.")
    print(f"self-test: one stream was cut, and of {result.requests} requests one was counted as failed:")
    print(result.failures[0], flush=True)


def until(load: Load, requests: int) -> None:
    """Wait until so many requests are done, but not for ever."""
    give_up = time.monotonic() + 2 * PATIENCE_S
    while load.done < requests and time.monotonic() < give_up:
        time.sleep(0.05)


def restart(command: list[str], number: int, load: Load) -> float:
    """Run the command once; return the seconds that it took."""
    with LOG.open("ab") as log:
        log.write(f"\n=== round {number}, {load.elapsed:.1f} s after the load began\n".encode())
        log.flush()
        started = time.perf_counter()
        problem = ""
        try:
            # Without a terminal ./lab does not ask.
            ended = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=COMMAND_S,
                check=False,
            )
            problem = f"ended with {ended.returncode}" if ended.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"had not ended after {COMMAND_S} s"
        except OSError as error:
            problem = f"does not start ({error})"
        took = time.perf_counter() - started
    if problem:
        show_failures(load.stop())
        last = "\n".join(LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:])
        raise SystemExit(f"{last}\nrestart: {shlex.join(command)} {problem} in round {number}. All of it is in {LOG}.")
    return took


def under_restarts(load: Load, command: list[str], requests: int, rounds: int) -> tuple[Result, list[float]]:
    """Restart until both are done; return what the load saw, and the seconds of each round."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_bytes(b"")
    print(f"restarting: {shlex.join(command)}, its output goes to {LOG}", flush=True)
    load.start()
    seconds: list[float] = []
    while len(seconds) < rounds or load.done < requests:
        seconds.append(restart(command, len(seconds) + 1, load))
        print(f"round {len(seconds)}: {seconds[-1]:.1f} s, {load.done} requests so far", flush=True)
    return load.stop(), seconds


def show(calm: Result, restarted: Result, rounds: list[float]) -> None:
    """Print calm beside restarted."""

    def line(name: str, before: str, after: str) -> None:
        print(f"{name:38}{before:>12}{after:>12}")

    def times(name: str, before: list[float], after: list[float]) -> None:
        for title, part in (("p50", 50), ("p99", 99), ("longest", 100)):
            line(f"{name}, {title}", *(_seconds(percentile(values, part)) for values in (before, after)))

    print()
    line("", "calm", "restarted")
    line("requests", str(calm.requests), str(restarted.requests))
    line("failed", str(len(calm.failures)), str(len(restarted.failures)))
    line("requests per second", f"{calm.rate:.1f}", f"{restarted.rate:.1f}")
    line("answered by a fallback", str(calm.fallbacks), str(restarted.fallbacks))
    times("first token (streaming)", calm.first_token, restarted.first_token)
    times("whole answer (not streaming)", calm.whole, restarted.whole)
    line("rounds", "0", str(len(rounds)))
    line("a round, p50", "", _seconds(percentile(rounds, 50)))
    line("a round, longest", "", _seconds(percentile(rounds, 100)))
    for ending in sorted({*calm.endings, *restarted.endings}):
        model, other, reason = ending
        line(f"{model} by {other}: {reason}", str(calm.endings[ending]), str(restarted.endings[ending]))
    known = {(model, reason) for model, _other, reason in calm.endings}
    if any((model, reason) not in known for model, _other, reason in restarted.endings):
        print("Some answers ended as none did in calm: look whether the gateway ended them in a dead server's stead.")
    print()


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f} s"


def main() -> int:
    """Test ourselves, measure in calm, restart, print."""
    parser = argparse.ArgumentParser(description="Restart all servers under load; is a request lost?")
    parser.add_argument("--requests", type=int, default=5000, help="requests under restarts (default: 5000)")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many restarts of everything (default: 3)")
    parser.add_argument("--command", default="./lab restart", help="what restarts (default: ./lab restart)")
    parser.add_argument("--models", default="chat,code", help="models that answer chats (default: chat,code)")
    parser.add_argument("--fallback", action="append", metavar="MODEL=FALLBACK", help="(default: code=chat)")
    parser.add_argument("--inventory", default="inventories/box", help="(default: inventories/box)")
    words = parser.parse_args()
    url, key = find_gateway(words.inventory)
    models = choose(words.models, words.fallback or ["code=chat"], served(url, key))

    self_test(url, key, models)
    calm = Load(url, key, models, patience_s=PATIENCE_S).run(CALM_REQUESTS)
    if calm.failures:
        show_failures(calm)
        raise SystemExit(f"restart: {len(calm.failures)} of {calm.requests} requests failed without any restart.")
    first_s, whole_s = deadline(calm.first_token), deadline(calm.whole)
    print(f"calm: {calm.requests} requests, none lost, {calm.rate:.1f} per second", flush=True)
    load = Load(url, key, models, first_token_s=first_s, whole_s=whole_s, patience_s=PATIENCE_S)
    restarted, rounds = under_restarts(load, shlex.split(words.command), words.requests, words.rounds)
    show(calm, restarted, rounds)
    print(f"{len(restarted.failures)} of {restarted.requests} requests were lost in {len(rounds)} rounds.")
    print(f"A first token was late after {first_s:.1f} s, a whole answer after {whole_s:.1f} s.")
    show_failures(restarted)
    return 1 if restarted.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
