# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks an OpenAI-compatible gateway without a pause, and counts every request that is not answered as it has to be.

    load = Load("http://172.30.99.11:4000", key, {"chat": {"chat"}, "code": {"code", "chat"}})
    calm = load.run(requests=500)

Every client is a thread that sends one chat completion after the other, every second one streaming. It never sends a
request twice. Cutter is a relay that cuts one stream on purpose: whoever proves that nothing was lost shows with it
first that a loss would have been counted.
"""

from __future__ import annotations

import json
import math
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

GRACE_S = 10.0
# A refused connection takes no time: without a rest one dead gateway would be a hundred thousand failures.
REST_S = 0.1
TOKENS = 16
SHOWN = 300
FALLBACKS = "x-litellm-attempted-fallbacks"


def percentile(values: list[float], part: float) -> float:
    """Return the smallest value that so many percent of all do not exceed; NaN where there is none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(part / 100 * len(values)) - 1)]


def deadline(calm: list[float]) -> float:
    """Return how long an answer may take, by what the calm phase took."""
    if not calm:
        raise ValueError("the calm phase measured nothing, so there is nothing to hold the answers against")
    return GRACE_S + percentile(calm, 99)


@dataclass(frozen=True)
class Failure:
    """A request that was lost. The offset is when it was sent, in seconds since the load began."""

    offset: float
    seconds: float
    client: int
    model: str
    streaming: bool
    reason: str

    def __str__(self) -> str:
        kind = "streaming" if self.streaming else "whole"
        return f"{self.offset:8.1f} s  client {self.client}  {self.model} ({kind}), {self.seconds:.1f} s: {self.reason}"


@dataclass
class Result:
    """What a load has seen. The times are those of all requests that got so far, also of those that came too late."""

    requests: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    # (model asked, model that answered, finish_reason) of the good answers. A gateway that makes up the end of a
    # stream whose server has died shows here only: by a finish_reason that the calm phase did not have.
    endings: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    # Good answers that came from a fallback, as far as the gateway says so.
    fallbacks: int = 0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0


class Lost(Exception):
    """Why a request counts as failed, in one sentence."""


@dataclass
class _Answer:
    """What is known of an answer so far."""

    model: str = ""
    fallback: bool = False
    ending: str = ""
    first_s: float | None = None
    whole_s: float | None = None


class Load:
    """Clients that ask for these models in turn. The names say by which model each may be answered.

    An answer that comes after its deadline is failed, but waited for until patience_s: so the times stay true, and the
    reason tells slow from dead.
    """

    def __init__(
        self,
        base_url: str,
        key: str,
        models: dict[str, set[str]],
        clients: int = 8,
        first_token_s: float = 60.0,
        whole_s: float = 60.0,
        patience_s: float = 120.0,
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme != "http" or not address.hostname:
            raise ValueError(f"{base_url} is not the address of a gateway, like http://172.30.99.11:4000")
        self._host, self._port = address.hostname, address.port or 80
        self._path = address.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._key = key
        self._models = list(models.items())
        self._first_token_s, self._whole_s, self._patience_s = first_token_s, whole_s, patience_s
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(one,), daemon=True) for one in range(clients)]
        self._limit: int | None = None
        self._taken = 0
        self._began = 0.0
        self._result = Result()

    @property
    def done(self) -> int:
        """How many requests have ended, well or not."""
        with self._lock:
            return self._result.requests

    @property
    def elapsed(self) -> float:
        """Seconds since the load began: the clock of Failure.offset."""
        return time.perf_counter() - self._began

    def start(self) -> None:
        """Let the clients go until stop(). A load is used once."""
        self._began = time.perf_counter()
        for thread in self._threads:
            thread.start()

    def stop(self) -> Result:
        """Let every client finish the request that it has sent, for one that we cut ourselves would prove nothing."""
        self._stopping.set()
        return self._join()

    def run(self, requests: int) -> Result:
        """Send so many requests, no more and no less."""
        self._limit = requests
        self.start()
        return self._join()

    def _join(self) -> Result:
        for thread in self._threads:
            thread.join()
        self._result.seconds = self.elapsed
        return self._result

    def _tickets(self) -> Iterator[int]:
        while not self._stopping.is_set():
            with self._lock:
                if self._taken == self._limit:
                    return
                self._taken += 1
                number = self._taken - 1
            yield number

    def _client(self, client: int) -> None:
        for number in self._tickets():
            model, allowed = self._models[number // 2 % len(self._models)]
            streaming = number % 2 == 0
            answer, reason = _Answer(), ""
            sent = time.perf_counter()
            try:
                self._ask(number, model, allowed, streaming, sent, answer)
            except Lost as lost:
                reason = str(lost)
            except TimeoutError:
                reason = f"nothing came for {self._patience_s:g} s"
            except (OSError, HTTPException) as error:
                reason = f"the connection broke: {error!r}"
            except Exception as error:  # an answer of an unforeseen shape; a client that dies of it would send no more
                reason = f"the answer cannot be read: {error!r}"
            took = time.perf_counter() - sent
            with self._lock:
                self._result.requests += 1
                if answer.first_s is not None:
                    self._result.first_token.append(answer.first_s)
                if answer.whole_s is not None:
                    self._result.whole.append(answer.whole_s)
                if reason:
                    reason = " ".join(reason.replace(self._key, "(key)").split())
                    failure = Failure(sent - self._began, took, client, model, streaming, reason)
                    self._result.failures.append(failure)
                else:
                    self._result.endings[model, answer.model, answer.ending] += 1
                    self._result.fallbacks += answer.fallback
            if reason:
                self._stopping.wait(REST_S)

    def _ask(self, number: int, model: str, allowed: set[str], streaming: bool, sent: float, answer: _Answer) -> None:
        # The number keeps caches from answering in the servers' stead.
        question = [{"role": "user", "content": f"Question {number}: how are you?"}]
        body = {"model": model, "messages": question, "max_tokens": TOKENS, "temperature": 0, "stream": streaming}
        # A connection of its own for each: what an idle one of a pool dies of is the client's affair.
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}", "Connection": "close"}
        connection = HTTPConnection(self._host, self._port, timeout=self._patience_s)
        try:
            connection.request("POST", self._path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                text = response.read(SHOWN).decode(errors="replace")
                raise Lost(f"status {response.status} {response.reason}: {text}")
            # LiteLLM writes the name that was asked for into what it answers; that another answered is in the headers.
            answer.fallback = response.getheader(FALLBACKS, "0").strip() not in ("", "0", "None")
            if answer.fallback and allowed <= {model}:
                raise Lost(f"a fallback answered, and {model} declares none")
            if streaming:
                self._stream(response, allowed, sent, answer)
                _in_time("the first token", answer.first_s, self._first_token_s)
            else:
                self._whole(response, allowed, sent, answer)
                _in_time("the answer", answer.whole_s, self._whole_s)
            if not answer.model:
                raise Lost("the answer does not say which model it is of")
        finally:
            connection.close()

    def _stream(self, response: HTTPResponse, allowed: set[str], sent: float, answer: _Answer) -> None:
        complete = False
        while not complete and (line := response.readline()):
            now = time.perf_counter() - sent
            if now > self._patience_s:
                raise Lost(f"the stream had not ended after {now:.1f} s")
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                complete = True
                continue
            choices = _choices(data, allowed, answer)
            # A token may have no text, as half a character has none: a stream without any begins where it ends.
            text = any((one.get("delta") or {}).get(key) for one in choices for key in ("content", "reasoning_content"))
            if answer.first_s is None and (text or answer.ending):
                answer.first_s = now
        missing = [] if answer.ending else ["a finish_reason"]
        missing += [] if complete else ["[DONE]"]
        if missing:
            begun = "after its first token" if answer.first_s is not None else "before its first token"
            raise Lost(f"the stream ended {begun}, without {' and without '.join(missing)}")

    def _whole(self, response: HTTPResponse, allowed: set[str], sent: float, answer: _Answer) -> None:
        choices = _choices(response.read(), allowed, answer)
        answer.whole_s = time.perf_counter() - sent
        message = (choices[0].get("message") or {}) if choices else {}
        # A model that thinks first may not get further in so few tokens.
        text = message.get("content") or message.get("reasoning_content")
        if not isinstance(text, str) or not text:
            raise Lost(f"the answer has no text: {json.dumps(choices)[:SHOWN]}")


def _choices(data: bytes, allowed: set[str], answer: _Answer) -> list[dict[str, Any]]:
    """Return the choices of an answer or of a piece of one; note who answered, and how it ended."""
    try:
        piece = json.loads(data)
    except ValueError:
        raise Lost(f"not JSON: {data[:SHOWN].decode(errors='replace')}") from None
    if not isinstance(piece, dict):
        raise Lost(f"not an answer: {data[:SHOWN].decode(errors='replace')}")
    if piece.get("error"):
        raise Lost(f"an error with status 200: {json.dumps(piece['error'])[:SHOWN]}")
    answer.model = piece.get("model") or answer.model
    if answer.model and answer.model not in allowed:
        raise Lost(f"{answer.model} answered, which is not among {', '.join(sorted(allowed))}")
    choices = piece.get("choices") or []
    answer.ending = next((one["finish_reason"] for one in choices if one.get("finish_reason")), answer.ending)
    return choices


def _in_time(what: str, took: float | None, allowed: float) -> None:
    if took is not None and took > allowed:
        raise Lost(f"{what} came after {took:.1f} s, {allowed:.1f} s are allowed")


class Cutter:
    """A TCP relay before a gateway that cuts one stream when it is told to.

    with Cutter("http://172.30.99.11:4000") as cutter:
        load = Load(cutter.url, key, models)
        load.start()
        cutter.cut()

    It expects one request per connection, as Load makes them.
    """

    def __init__(self, base_url: str) -> None:
        address = urlsplit(base_url)
        self._target = (address.hostname, address.port or 80)
        self._armed = threading.Lock()
        self._armed.acquire()
        self._was_cut = threading.Event()
        relay = self._relay

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                relay(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64  # with the default of 5 some of eight clients wait a second for their connection

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{address.path}"
        self.cuts = 0

    def __enter__(self) -> Cutter:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def cut(self, timeout: float = 60.0) -> bool:
        """Cut the next stream that has begun and not ended; wait for it, and return whether there was one."""
        self._was_cut.clear()
        self._armed.release()
        if self._was_cut.wait(timeout):
            return True
        # Where it cannot be taken back, it was cut in this very moment.
        return not self._armed.acquire(blocking=False)

    def _relay(self, client: socket.socket) -> None:
        try:
            gateway = socket.create_connection(self._target, timeout=60)
        except OSError:
            return
        gateway.settimeout(None)
        with gateway:
            threading.Thread(target=self._questions, args=(client, gateway), daemon=True).start()
            with suppress(OSError):  # one of the two may go, which the other is told then
                self._answers(gateway, client)
            _hang_up(gateway)
            _hang_up(client)

    @staticmethod
    def _questions(client: socket.socket, gateway: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                gateway.sendall(data)
        _hang_up(gateway)

    def _answers(self, gateway: socket.socket, client: socket.socket) -> None:
        passed = b""
        while data := gateway.recv(65536):
            whole = passed + data
            begun = whole.find(b"\n", whole.find(b"data:")) if b"data:" in whole else -1
            # Taking the lock is being the one that is cut; once [DONE] is out there is nothing left to cut.
            streams = b"text/event-stream" in whole and begun >= 0 and b"[DONE]" not in passed
            if streams and self._armed.acquire(blocking=False):
                client.sendall(whole[len(passed) : begun + 1])
                self.cuts += 1
                self._was_cut.set()
                return
            client.sendall(data)
            passed = whole


def _hang_up(one: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        one.shutdown(socket.SHUT_RDWR)
