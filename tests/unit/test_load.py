# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The load generator counts every kind of lost request, against a real HTTP server that loses them on purpose."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.bench import load
from tests.bench.load import Cutter, Failure, Load, Result

KEY = "sk-a-key-of-this-test"
LATE_S = 0.1


class Gateway(ThreadingHTTPServer):
    """Answers as LiteLLM does, except for what the test tells it to do wrong."""

    daemon_threads = True
    request_queue_size = 64
    wrong = ""
    answers_as = ""
    asked: list[dict[str, Any]]

    def handle_error(self, *_words: object) -> None:
        """Say nothing of clients that hung up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_words: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({**body, "path": self.path, "key": self.headers["Authorization"]})
        wrong = self.server.wrong
        if wrong == "hang up":
            self.close_connection = True
        elif wrong == "503":
            self.send(503, "application/json", json.dumps({"error": {"message": f"no server\nfor {KEY}"}}).encode())
        elif body["stream"]:
            self.stream(body["model"], wrong)
        else:
            self.whole(body["model"], wrong)

    def send(self, status: int, kind: str, content: bytes | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header(*(("Transfer-Encoding", "chunked") if content is None else ("Content-Length", len(content))))
        if self.server.wrong == "fallback":
            self.send_header("x-litellm-attempted-fallbacks", "1")
        self.end_headers()
        self.wfile.write(content or b"")

    def whole(self, model: str, wrong: str) -> None:
        text = {"no text": None, "empty text": ""}.get(wrong, "fine")
        answer: dict[str, Any] = {"model": self.server.answers_as or model}
        answer["choices"] = [{"message": {"content": text}, "finish_reason": "length"}]
        if wrong == "unnamed":
            del answer["model"]
        if wrong == "error":
            answer = {"error": {"message": "out of memory"}}
        if wrong == "late":
            time.sleep(LATE_S)
        if wrong == "odd choices":
            answer["choices"] = "none"
        content = b"[1]" if wrong == "shape" else json.dumps(answer).encode()
        self.send(200, "application/json", content[: -3 if wrong == "not json" else None])

    def stream(self, model: str, wrong: str) -> None:
        named = {} if wrong == "unnamed" else {"model": self.server.answers_as or model}

        def piece(delta: dict[str, str], ending: str | None = None) -> dict[str, Any]:
            return {**named, "choices": [{"delta": delta, "finish_reason": ending}]}

        self.send(200, "text/event-stream")
        self.event(piece({"role": "assistant", "content": ""}))
        if wrong == "late":
            time.sleep(LATE_S)
        self.event(piece({"content": "fi"}))
        if wrong == "error":
            self.event({"error": {"message": "out of memory"}})
        if wrong == "shape":
            self.event([1])
        if wrong == "odd choices":
            self.event({**named, "choices": "none"})
        if wrong == "silence":
            time.sleep(LATE_S)
        if wrong == "break":
            self.close_connection = True
            return
        if wrong != "no finish_reason":
            self.event(piece({"content": "ne"}))
            self.event(piece({}, "length"))
        if wrong != "no [DONE]":
            self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, content: Any) -> None:
        self.chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(load, "REST_S", 0)
    with Gateway(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(gateway: Gateway, requests: int = 8, **more: Any) -> Result:
    """Let two clients ask."""
    return Load(gateway.url, KEY, more.pop("models", {"chat": {"chat"}}), clients=2, **more).run(requests)


def failures(result: Result, streaming: bool) -> list[Failure]:
    """Return the failures of one kind."""
    return [failure for failure in result.failures if failure.streaming is streaming]


def test_good_answers_are_counted_and_none_is_lost(gateway: Gateway) -> None:
    result = ask(gateway, 40, models={"chat": {"chat"}, "code": {"code"}})
    assert result.failures == []
    assert (result.requests, len(result.first_token), len(result.whole)) == (40, 20, 20)
    assert result.endings == {("chat", "chat", "length"): 20, ("code", "code", "length"): 20}
    assert result.rate > 0
    assert len(gateway.asked) == 40
    asked = [(one["model"], one["stream"]) for one in gateway.asked]
    assert {kind: asked.count(kind) for kind in asked} == {
        (model, stream): 10 for model in ("chat", "code") for stream in (True, False)
    }
    for one in gateway.asked:
        assert (one["path"], one["key"]) == ("/v1/chat/completions", f"Bearer {KEY}")
        assert (one["temperature"], one["max_tokens"]) == (0, 16)


def test_a_load_goes_on_until_it_is_stopped(gateway: Gateway) -> None:
    running = Load(gateway.url, KEY, {"chat": {"chat"}}, clients=3)
    running.start()
    while running.done < 12:
        time.sleep(0.01)
    result = running.stop()
    assert 12 <= result.requests == running.done == len(gateway.asked)
    assert result.failures == []


@pytest.mark.parametrize(
    ("wrong", "streaming", "whole"),
    [
        ("503", "status 503 Service Unavailable", "status 503 Service Unavailable"),
        ("hang up", "connection broke", "connection broke"),
        ("break", "without a finish_reason and without [DONE]|connection broke", None),
        ("no [DONE]", "ended after its first token, without [DONE]", None),
        ("no finish_reason", "without a finish_reason", None),
        ("error", "out of memory", "out of memory"),
        ("shape", "not an answer: [1]", "not an answer: [1]"),
        ("odd choices", "cannot be read", "cannot be read"),
        ("unnamed", "does not say which model", "does not say which model"),
        ("fallback", "chat declares none", "chat declares none"),
        ("no text", None, "has no text"),
        ("empty text", None, "has no text"),
        ("not json", None, "not JSON"),
    ],
)
def test_a_lost_request_is_counted_with_its_reason(
    gateway: Gateway, wrong: str, streaming: str | None, whole: str | None
) -> None:
    gateway.wrong = wrong
    result = ask(gateway)
    assert len(gateway.asked) == result.requests == 8, "none is sent twice"
    for kind, expected in ((True, streaming), (False, whole)):
        found = failures(result, kind)
        assert len(found) == (4 if expected else 0), found
        for failure in found:
            assert any(part in failure.reason for part in (expected or "").split("|")), failure
            assert failure.model == "chat"
            assert failure.client in (0, 1)
            assert 0 <= failure.offset <= result.seconds
            assert KEY not in str(failure)
            assert "\n" not in str(failure)


def test_a_gateway_that_is_not_there_loses_everything() -> None:
    with Gateway(("127.0.0.1", 0), Handler) as server:
        url = server.url
    result = Load(url, KEY, {"chat": {"chat"}}, clients=2).run(4)
    assert ["Refused" in failure.reason for failure in result.failures] == [True] * 4


def test_another_model_is_a_loss_unless_it_is_declared(gateway: Gateway) -> None:
    gateway.answers_as = "chat"
    lost = ask(gateway, models={"code": {"code"}})
    assert ["chat answered, which is not among code" in one.reason for one in lost.failures] == [True] * 8
    accepted = ask(gateway, models={"code": {"code", "chat"}})
    assert accepted.failures == []
    assert accepted.endings == {("code", "chat", "length"): 8}


def test_a_declared_fallback_is_counted(gateway: Gateway) -> None:
    gateway.wrong = "fallback"
    result = ask(gateway, models={"code": {"code", "chat"}})
    assert (result.failures, result.fallbacks) == ([], 8)


def test_what_comes_too_late_is_a_loss_and_measured(gateway: Gateway) -> None:
    gateway.wrong = "late"
    result = ask(gateway, 4, first_token_s=LATE_S / 3, whole_s=60)
    assert [one.streaming for one in result.failures] == [True] * 2
    assert all("the first token came after" in one.reason for one in result.failures)
    assert min(result.first_token) >= LATE_S
    result = ask(gateway, 4, first_token_s=60, whole_s=LATE_S / 3)
    assert [one.streaming for one in result.failures] == [False] * 2
    assert all("the answer came after" in one.reason for one in result.failures)


def test_a_stream_that_stands_still_is_given_up(gateway: Gateway) -> None:
    gateway.wrong = "silence"
    result = ask(gateway, 2, patience_s=LATE_S / 3)
    assert [(one.streaming, "nothing came for" in one.reason) for one in result.failures] == [(True, True)]


@pytest.mark.parametrize("times", [0, 1, 3])
def test_the_cutter_cuts_exactly_what_it_is_told_to(gateway: Gateway, times: int) -> None:
    with Cutter(gateway.url) as cutter:
        running = Load(cutter.url, KEY, {"chat": {"chat"}}, clients=8)
        running.start()
        for _time in range(times):
            assert cutter.cut(10)
        goal = running.done + 20
        while running.done < goal:
            time.sleep(0.01)
        result = running.stop()
    assert cutter.cuts == len(result.failures) == times
    assert all(failure.streaming for failure in result.failures)


def test_the_cutter_says_when_there_was_nothing_to_cut(gateway: Gateway) -> None:
    with Cutter(gateway.url) as cutter:
        assert not cutter.cut(0.05)
        assert Load(cutter.url, KEY, {"chat": {"chat"}}, clients=2).run(8).failures == []


def test_percentiles_and_deadlines() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [load.percentile(values, part) for part in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert math.isnan(load.percentile([], 99))
    assert load.deadline(values) == 10 + 99
    with pytest.raises(ValueError, match="measured nothing"):
        load.deadline([])


@pytest.mark.parametrize("address", ["172.30.99.11:4000", "https://gateway", ""])
def test_an_address_has_to_be_one(address: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a gateway"):
        Load(address, KEY, {"chat": {"chat"}})
