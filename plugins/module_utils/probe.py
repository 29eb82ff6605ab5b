# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The health ladder of one endpoint, the wait for a server that loads, and the verdict over all tiers.

A model server is asked from cheap to dear: TCP, C(/health), C(/slots), then one token. The first rung that answers the
question ends the climb:

STARTING  it says itself that it loads its model
HEALTHY   it made a token (or, elsewhere, answered 200)
BUSY      a new request would have to wait, because others are being worked on
DEGRADED  it answers, but not with what it is there for
HUNG      it holds the connection and nothing moves
DOWN      nothing answers

llama-server shows progress only between two batches of a prompt, and one batch can take longer than any deadline. A
server that reads a prompt is therefore BUSY even when nothing was seen to move; a later look tells whether it hangs.

Of a server whose models take turns the ladder ends with what it says of them: a token would wake one of them and put
another to sleep.

This file is also copied to the nodes, beside the node program: it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.parse
from typing import Any, Callable, NamedTuple

STARTING = "STARTING"
HEALTHY = "HEALTHY"
BUSY = "BUSY"
DEGRADED = "DEGRADED"
HUNG = "HUNG"
DOWN = "DOWN"
AWAY = "AWAY"

SERVING = (HEALTHY, BUSY)
GATEWAY = "GATEWAY"

# What is asked of each kind of endpoint; the ladder of a llama-server is longer.
PATHS = {"http": "", "litellm": "/health/liveliness", "ollama": "/api/version"}

CANARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1}),
    "embedding": ("/v1/embeddings", {"input": "1"}),
}

# The mode of a server whose models take turns.
TURNS = "turns"

BODY_LIMIT = 4 * 1024 * 1024


class ProbeError(Exception):
    """No HTTP answer came: state says what that means, the text says how it showed."""

    def __init__(self, state: str, message: str) -> None:
        super().__init__(message)
        self.state = state


class Answer(NamedTuple):
    status: int
    body: bytes


class Look(NamedTuple):
    """What a server shows of its work: its slots, or its token counters where it does not show slots."""

    slots: list[dict[str, Any]] | None
    counters: str | None
    evidence: str


def request(url: str, deadline: float, api_key: str | None = None, body: dict[str, Any] | None = None) -> Answer:
    """GET the address, or POST the body to it; an answer that is not whole by the deadline (time.monotonic) is none."""
    timeout = max(deadline - time.monotonic(), 0.001)
    headers = {"Connection": "close", "Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    sockets: list[socket.socket] = []
    outcome: list[Answer | Exception] = []

    def talk() -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("not an http or https address")
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname, parts.port, timeout=timeout)
            connection.connect()
            sockets.append(connection.sock)
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            payload = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, body=payload, headers=headers)
            response = connection.getresponse()
            answer = Answer(response.status, response.read(BODY_LIMIT))
            connection.close()
            outcome.append(answer)
        except Exception as error:  # judged by the thread that waits
            outcome.append(error)

    # Name resolution knows no timeout, and a socket's own starts anew with every byte: a second thread keeps it.
    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    thread.join(timeout)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, Answer):
        return result
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # ends a thread that still reads
    # socket.timeout is a class of its own up to Python 3.9.
    if not isinstance(result, (TimeoutError, socket.timeout)):
        raise ProbeError(DOWN, str(result) or type(result).__name__)
    if sockets:
        raise ProbeError(HUNG, f"connected, but no whole answer within {timeout:.1f} s")
    raise ProbeError(DOWN, f"no connection within {timeout:.1f} s")


def probe(endpoint: dict[str, Any]) -> dict[str, Any]:
    """Ask one endpoint: url, timeout (s), kind (http, llamacpp, litellm, ollama), for llamacpp mode and api_key.

    Where it may_be_away, one that does not answer at all is AWAY, which is no fault.
    """
    started = time.monotonic()
    evidence: list[str] = []
    deadline = started + endpoint["timeout"]
    try:
        if endpoint["kind"] == "llamacpp":
            state = _climb(endpoint["url"].rstrip("/"), deadline, endpoint["mode"], endpoint["api_key"], evidence)
        else:
            path = PATHS[endpoint["kind"]]
            state = _plain((endpoint["url"].rstrip("/") if path else endpoint["url"]) + path, deadline, evidence)
    except ProbeError as error:
        state = error.state
        evidence.append(str(error))
    if state == DOWN and endpoint.get("may_be_away"):
        state = AWAY
    return {"state": state, "evidence": evidence, "seconds": round(time.monotonic() - started, 2)}


def probe_all(endpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ask all endpoints side by side; it takes as long as the longest deadline, however many of them are silent."""
    results: list[dict[str, Any]] = [{} for endpoint in endpoints]

    def ask(index: int, endpoint: dict[str, Any]) -> None:
        results[index] = {key: endpoint[key] for key in ("name", "url", "tier", "kind")} | probe(endpoint)

    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in enumerate(endpoints)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wait_ready(
    url: str, deadline_s: float, mode: str, alive: Callable[[], bool], api_key: str | None = None
) -> dict[str, Any]:
    """Wait until a server that was just started makes its first token; C(ready) says whether it did.

    A refused connection and "Loading model" are normal until the deadline. It ends at once when alive() says that the
    process is gone.
    """
    started = time.monotonic()
    result: dict[str, Any] = {"state": DOWN, "evidence": []}
    while True:
        if not alive():
            result = {"state": DOWN, "evidence": [*result["evidence"], "the server ended while it was starting"]}
            break
        remaining = started + deadline_s - time.monotonic()
        if remaining <= 0:
            result["evidence"].append(f"not ready within {deadline_s:g} s")
            break
        # One look is kept short, so that a server that ends is noticed early.
        look = {"url": url, "timeout": min(remaining, 20.0), "kind": "llamacpp", "mode": mode, "api_key": api_key}
        result = probe(look)
        # A model that failed to load is not tried again before it is asked for.
        if result["state"] in SERVING or (mode == TURNS and result["state"] == DEGRADED):
            break
        time.sleep(min(0.5, max(remaining, 0)))
    seconds = round(time.monotonic() - started, 2)
    return {**result, "ready": result["state"] in SERVING, "seconds": seconds}


def prognosis(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict per tier and over all.

    A tier is HEALTHY when each of its endpoints serves (HEALTHY or BUSY), DEGRADED when some do, DOWN when none does.
    Those that are AWAY are left out; a tier of which all are is AWAY.
    Overall: DOWN when the gateway's tier is DOWN or no other tier serves; else DEGRADED when any tier is DEGRADED or
    DOWN; else HEALTHY.
    """
    serving: dict[str, list[bool]] = {}
    for result in results:
        present = serving.setdefault(result["tier"], [])
        if result["state"] != AWAY:
            present.append(result["state"] in SERVING)
    tiers = {
        tier: AWAY if not oks else HEALTHY if all(oks) else DEGRADED if any(oks) else DOWN
        for tier, oks in serving.items()
    }
    others = [state for tier, state in tiers.items() if tier != GATEWAY]
    if tiers.get(GATEWAY) == DOWN or (others and all(state in (DOWN, AWAY) for state in others)):
        overall = DOWN
    else:
        overall = HEALTHY if all(state in (HEALTHY, AWAY) for state in tiers.values()) else DEGRADED
    return {"tiers": tiers, "overall": overall}


def table(results: list[dict[str, Any]], verdict: dict[str, Any]) -> str:
    """Results and verdict as lines for people."""
    rows = [("TIER", "ENDPOINT", "STATE", "TIME", "EVIDENCE")]
    for result in sorted(results, key=lambda result: result["tier"]):
        seconds = f"{result['seconds']:.2f} s"
        rows.append((result["tier"], result["name"], result["state"], seconds, result["evidence"][-1]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[4] for row in rows]
    tiers = ", ".join(f"{tier} {state}" for tier, state in sorted(verdict["tiers"].items()))
    return "\n".join([*lines, "", f"Tiers: {tiers or 'none'}", f"Overall: {verdict['overall']}"])


def _plain(url: str, deadline: float, evidence: list[str]) -> str:
    answer = request(url, deadline)
    evidence.append(f"GET {urllib.parse.urlsplit(url).path or '/'}: {answer.status}")
    return HEALTHY if answer.status == 200 else DEGRADED


def _climb(url: str, deadline: float, mode: str, api_key: str | None, evidence: list[str]) -> str:
    answer = request(url + "/health", deadline)
    evidence.append(f"/health: {answer.status}")
    if answer.status == 503:
        evidence.append(_message(answer))
        return STARTING
    if answer.status != 200:
        return DEGRADED
    if mode == TURNS:
        return _turns(url, deadline, api_key, evidence)

    before = _look(url, _share(deadline, 0.4), api_key)
    evidence.append(before.evidence)
    if not before.slots or not all(slot["is_processing"] for slot in before.slots):
        path, body = CANARIES[mode]
        try:
            answer = request(url + path, _share(deadline, 0.8), api_key, body)
        except ProbeError as error:
            if error.state == DOWN:
                raise
            evidence.append(f"{path}: {error}")
        else:
            evidence.append(f"{path}: {answer.status}" + ("" if answer.status == 200 else f" {_message(answer)}"))
            return HEALTHY if answer.status == 200 else DEGRADED

    while True:
        after = _look(url, deadline, api_key)
        if _moved(before, after):
            evidence.append("it works on other requests")
            return BUSY
        if time.monotonic() > deadline - 0.5:
            break
        time.sleep(0.25)
    if any(_reads_prompt(slot) for slot in before.slots or []):
        evidence.append("it reads a prompt; no progress was seen yet")
        return BUSY
    evidence.append("nothing moves")
    return HUNG


def _turns(url: str, deadline: float, api_key: str | None, evidence: list[str]) -> str:
    """Ask a llama-server in router mode which of its models is awake, and whether one could not be loaded."""
    answer = request(url + "/models", deadline, api_key)
    if answer.status != 200:
        evidence.append(f"/models: {answer.status} {_message(answer)}")
        return DEGRADED
    try:
        found = {model["id"]: model["status"] for model in json.loads(answer.body)["data"]}
        words = {name: "failed to load" if one.get("failed") else str(one["value"]) for name, one in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        evidence.append("/models: no router's answer")
        return DEGRADED
    evidence.append("/models: " + ", ".join(f"{name} {word}" for name, word in words.items()))
    if "failed to load" in words.values():
        return DEGRADED
    return STARTING if "loading" in words.values() else HEALTHY


def _share(deadline: float, part: float) -> float:
    """A deadline for one rung that leaves time for the rungs after it."""
    now = time.monotonic()
    return now + (deadline - now) * part


def _look(url: str, deadline: float, api_key: str | None) -> Look:
    try:
        answer = request(url + "/slots", _share(deadline, 0.6), api_key)
        if answer.status == 200:
            slots = json.loads(answer.body)
            busy = sum(slot["is_processing"] for slot in slots)
            return Look(slots, None, f"/slots: {busy} of {len(slots)} at work")
        evidence = f"/slots: {answer.status}"
    except (ProbeError, ValueError, KeyError, TypeError) as error:  # also what is not llama-server answers 200
        evidence = f"/slots: {error}"
    try:
        answer = request(url + "/metrics", deadline, api_key)
    except ProbeError as error:
        return Look(None, None, f"{evidence}, /metrics: {error}")
    lines = answer.body.decode(errors="replace").splitlines() if answer.status == 200 else []
    return Look(None, "\n".join(line for line in lines if "_total " in line and not line.startswith("#")), evidence)


def _moved(before: Look, after: Look) -> bool:
    """Whether work that was there at the first look went on. That a slot took up our own canary proves nothing."""
    if before.slots is not None and after.slots is not None:
        return any(_slot_moved(*pair) for pair in zip(before.slots, after.slots))
    return bool(before.counters and after.counters) and before.counters != after.counters


def _slot_moved(before: dict[str, Any], after: dict[str, Any]) -> bool:
    same = before.get("id_task") == after.get("id_task")
    if before["is_processing"] and not (same and after["is_processing"]):
        return True
    return _tokens(after) > (_tokens(before) if same else 0)


def _tokens(slot: dict[str, Any]) -> int:
    return slot.get("n_prompt_tokens_processed", 0) + _generated(slot)


def _generated(slot: dict[str, Any]) -> int:
    return sum(step.get("n_decoded", 0) for step in slot.get("next_token", []))


def _reads_prompt(slot: dict[str, Any]) -> bool:
    return slot["is_processing"] and _generated(slot) == 0


def _message(answer: Answer) -> str:
    """What an error answer says, in one line."""
    try:
        return str(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.body[:200].decode(errors="replace").strip().replace("\n", " ") or "without a word"
