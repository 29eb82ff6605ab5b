# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ladder against a real HTTP server that plays what llama-server shows, and the verdict over tiers."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import probe

IDLE = {"id": 0, "is_processing": False}


def slot(task: int, prompt: int = 0, generated: int = 0) -> dict:
    return {
        "id": 0,
        "is_processing": True,
        "id_task": task,
        "n_prompt_tokens_processed": prompt,
        "next_token": [{"n_decoded": generated}],
    }


class Server:
    """Answers each path with (status, body), with the next of several such answers, or, for None, not at all."""

    def __init__(self, **paths) -> None:
        self.paths = {"/" + name.replace("__", "/"): answers for name, answers in paths.items()}
        self.asked: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def answer(self, path: str):
        answers = self.paths.get(path, (404, {}))
        if isinstance(answers, list):
            return answers.pop(0) if len(answers) > 1 else answers[0]
        return answers

    @contextlib.contextmanager
    def running(self, port: int = 0):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.path, self.headers.get("Authorization")))
                answer = outer.answer(self.path)
                if answer is None:
                    outer.closing.wait()
                    return
                body = answer[1] if isinstance(answer[1], str) else json.dumps(answer[1])
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *args) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                self.closing.set()
                server.shutdown()


def ask(server: Server, timeout: float = 1.0, **more) -> dict:
    with server.running() as url:
        return probe.probe(
            {"url": url, "timeout": timeout, "kind": "llamacpp", "mode": "chat", "api_key": None, **more}
        )


OK = (200, {"status": "ok"})
TOKEN = (200, {"choices": []})


def test_a_server_that_makes_a_token_is_healthy() -> None:
    server = Server(health=OK, slots=(200, [IDLE]), v1__chat__completions=TOKEN)
    assert ask(server)["state"] == "HEALTHY"
    assert [path for path, key in server.asked] == ["/health", "/slots", "/v1/chat/completions"]


def test_the_key_is_sent_where_it_is_needed_and_nowhere_else() -> None:
    server = Server(health=OK, slots=(200, [IDLE]), v1__embeddings=TOKEN)
    assert ask(server, mode="embedding", api_key="k")["state"] == "HEALTHY"
    assert server.asked == [("/health", None), ("/slots", "Bearer k"), ("/v1/embeddings", "Bearer k")]


def test_loading_is_starting() -> None:
    result = ask(Server(health=(503, {"error": {"message": "Loading model"}})))
    assert result["state"] == "STARTING"
    assert result["evidence"] == ["/health: 503", "Loading model"]


def test_a_refused_key_is_degraded_and_says_so() -> None:
    refused = (401, {"error": {"message": "Invalid API Key"}})
    result = ask(Server(health=OK, slots=refused, metrics=refused, v1__chat__completions=refused))
    assert result["state"] == "DEGRADED"
    assert "Invalid API Key" in result["evidence"][-1]


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([(200, [slot(1, 512)]), (200, [slot(1, 1024)])], id="prompt read further"),
        pytest.param([(200, [slot(1, 512, 3)]), (200, [slot(1, 512, 4)])], id="token generated"),
        pytest.param([(200, [slot(1, 512, 9)]), (200, [slot(2)])], id="next request taken up"),
        pytest.param([(200, [slot(1, 512)])], id="prompt batch longer than the deadline"),
    ],
)
def test_work_on_others_is_busy_and_no_canary_joins_the_queue(looks: list) -> None:
    server = Server(health=OK, slots=looks, v1__chat__completions=None)
    assert ask(server)["state"] == "BUSY"
    assert "/v1/chat/completions" not in [path for path, key in server.asked]


def test_a_generation_that_stands_still_is_hung() -> None:
    assert ask(Server(health=OK, slots=(200, [slot(1, 512, 7)])))["state"] == "HUNG"


def test_an_idle_server_that_makes_no_token_is_hung() -> None:
    assert ask(Server(health=OK, slots=(200, [IDLE]), v1__chat__completions=None))["state"] == "HUNG"


def test_a_slot_that_took_up_our_own_canary_is_no_progress() -> None:
    server = Server(health=OK, slots=[(200, [IDLE]), (200, [slot(5)])], v1__chat__completions=None)
    assert ask(server)["state"] == "HUNG"


def test_silent_slots_with_rising_counters_are_busy_and_without_hung() -> None:
    # The deadline is shared by several looks, on a machine that may be busy.
    rising = [(200, f"llamacpp:prompt_tokens_total {count}\n") for count in range(9)]
    assert ask(Server(health=OK, slots=None, metrics=rising, v1__chat__completions=None), timeout=4)["state"] == "BUSY"
    still = (200, "llamacpp:prompt_tokens_total 7\n")
    assert ask(Server(health=OK, slots=None, metrics=still, v1__chat__completions=None))["state"] == "HUNG"


def test_a_server_that_accepts_and_says_nothing_is_hung() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for kind in ("llamacpp", "http"):
            result = probe.probe({"url": url, "timeout": 0.2, "kind": kind, "mode": "chat", "api_key": None})
            assert result["state"] == "HUNG"


def test_a_body_that_drips_does_not_outlast_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection = listener.accept()[0]
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        result = probe.probe({"url": url, "timeout": 0.5, "kind": "http"})
    assert result["state"] == "HUNG"
    assert 0.5 <= result["seconds"] < 0.7


def test_name_resolution_does_not_outlast_the_deadline(monkeypatch) -> None:
    # The resolver of the machine cannot be made to hang on purpose.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    result = probe.probe({"url": "http://slow.example/", "timeout": 0.3, "kind": "http"})
    assert result["state"] == "DOWN"
    assert result["seconds"] < 0.5


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:port/", "nas"])
def test_what_cannot_be_asked_is_down(url: str) -> None:
    assert probe.probe({"url": url, "timeout": 1, "kind": "http"})["state"] == "DOWN"


def test_each_kind_is_asked_where_it_answers_for_itself_alone() -> None:
    server = Server(health__liveliness=OK, api__version=OK, ping=OK)
    with server.running() as url:
        assert probe.probe({"url": url + "/", "timeout": 1, "kind": "litellm"})["state"] == "HEALTHY"
        assert probe.probe({"url": url, "timeout": 1, "kind": "ollama"})["state"] == "HEALTHY"
        assert probe.probe({"url": url + "/ping", "timeout": 1, "kind": "http"})["state"] == "HEALTHY"
        assert probe.probe({"url": url + "/pong", "timeout": 1, "kind": "http"})["state"] == "DEGRADED"
    assert [path for path, key in server.asked] == ["/health/liveliness", "/api/version", "/ping", "/pong"]


def turns(**states: str) -> tuple[int, dict]:
    broken = {"value": "unloaded", "failed": True, "exit_code": 1}
    return 200, {
        "data": [
            {"id": name, "status": broken if state == "failed" else {"value": state}} for name, state in states.items()
        ]
    }


@pytest.mark.parametrize(
    ("answer", "state", "evidence"),
    [
        (turns(one="loaded", two="unloaded"), "HEALTHY", "/models: one loaded, two unloaded"),
        (turns(one="sleeping", two="unloaded"), "HEALTHY", "/models: one sleeping, two unloaded"),
        (turns(one="unloaded", two="loading"), "STARTING", "/models: one unloaded, two loading"),
        (turns(one="loaded", two="failed"), "DEGRADED", "/models: one loaded, two failed to load"),
        ((401, {"error": {"message": "Invalid API Key"}}), "DEGRADED", "/models: 401 Invalid API Key"),
        ((200, {"data": [{"id": "one"}]}), "DEGRADED", "/models: no router's answer"),
        ((200, [1]), "DEGRADED", "/models: no router's answer"),
    ],
)
def test_of_models_that_take_turns_none_is_woken(answer: tuple, state: str, evidence: str) -> None:
    server = Server(health=OK, models=answer)
    result = ask(server, mode="turns", api_key="k")
    assert (result["state"], result["evidence"][-1]) == (state, evidence)
    assert server.asked == [("/health", None), ("/models", "Bearer k")]


def test_waiting_ends_at_once_when_a_model_that_takes_turns_does_not_load() -> None:
    with Server(health=OK, models=[turns(one="loading"), turns(one="failed")]).running() as url:
        result = probe.wait_ready(url, 30, "turns", lambda: True)
    assert (result["ready"], result["state"]) == (False, "DEGRADED")
    assert result["seconds"] < 10


def test_waiting_goes_on_through_refused_and_loading_until_the_first_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    loading = (503, {"error": {"message": "Loading model"}})
    server = Server(health=[loading, OK], slots=(200, [IDLE]), v1__chat__completions=TOKEN)
    answers: list[dict] = []
    waiter = threading.Thread(
        target=lambda: answers.append(probe.wait_ready(f"http://127.0.0.1:{port}", 20, "chat", lambda: True))
    )
    waiter.start()
    time.sleep(0.2)
    with server.running(port):
        waiter.join()
    assert answers[0]["ready"]
    assert answers[0]["state"] == "HEALTHY"
    assert [path for path, key in server.asked] == ["/health", "/health", "/slots", "/v1/chat/completions"]


def test_waiting_ends_at_once_when_the_process_is_gone() -> None:
    result = probe.wait_ready("http://127.0.0.1:1", 60, "chat", lambda: False)
    assert not result["ready"]
    assert result["seconds"] < 0.5
    assert result["evidence"][-1] == "the server ended while it was starting"


def test_waiting_ends_at_the_deadline_with_what_was_seen_last() -> None:
    with Server(health=(503, {"error": {"message": "Loading model"}})).running() as url:
        result = probe.wait_ready(url, 0.7, "chat", lambda: True)
    assert (result["ready"], result["state"]) == (False, "STARTING")
    assert result["evidence"][-2:] == ["Loading model", "not ready within 0.7 s"]


@pytest.mark.parametrize(
    ("states", "tiers", "overall"),
    [
        ({"LOCAL": ["HEALTHY", "BUSY"]}, {"LOCAL": "HEALTHY"}, "HEALTHY"),
        ({"LOCAL": ["HEALTHY", "HUNG"]}, {"LOCAL": "DEGRADED"}, "DEGRADED"),
        ({"LOCAL": ["STARTING"]}, {"LOCAL": "DOWN"}, "DOWN"),
        ({"LOCAL": ["HEALTHY"], "REMOTE": ["DOWN"]}, {"LOCAL": "HEALTHY", "REMOTE": "DOWN"}, "DEGRADED"),
        ({"LOCAL": ["HEALTHY"], "GATEWAY": ["DOWN"]}, {"LOCAL": "HEALTHY", "GATEWAY": "DOWN"}, "DOWN"),
        (
            {"LOCAL": ["HEALTHY"], "GATEWAY": ["HEALTHY", "DOWN"]},
            {"LOCAL": "HEALTHY", "GATEWAY": "DEGRADED"},
            "DEGRADED",
        ),
        ({"LOCAL": ["DEGRADED"], "GATEWAY": ["HEALTHY"]}, {"LOCAL": "DOWN", "GATEWAY": "HEALTHY"}, "DOWN"),
        ({"GATEWAY": ["HEALTHY"]}, {"GATEWAY": "HEALTHY"}, "HEALTHY"),
        ({"LOCAL": ["HEALTHY", "AWAY"]}, {"LOCAL": "HEALTHY"}, "HEALTHY"),
        ({"LOCAL": ["DOWN", "AWAY"], "REMOTE": ["HEALTHY"]}, {"LOCAL": "DOWN", "REMOTE": "HEALTHY"}, "DEGRADED"),
        ({"LOCAL": ["HEALTHY"], "RIG": ["AWAY"]}, {"LOCAL": "HEALTHY", "RIG": "AWAY"}, "HEALTHY"),
        ({"RIG": ["AWAY"], "GATEWAY": ["HEALTHY"]}, {"RIG": "AWAY", "GATEWAY": "HEALTHY"}, "DOWN"),
        ({}, {}, "HEALTHY"),
    ],
)
def test_prognosis(states: dict, tiers: dict, overall: str) -> None:
    results = [{"tier": tier, "state": state} for tier, many in states.items() for state in many]
    assert probe.prognosis(results) == {"tiers": tiers, "overall": overall}


@pytest.mark.parametrize(("may_be_away", "state"), [(True, "AWAY"), (False, "DOWN")])
def test_what_may_be_away_is_no_fault(may_be_away: bool, state: str) -> None:
    with socket.socket() as port:  # bound, and nobody listens
        port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        endpoint = {"url": url, "timeout": 2, "kind": "http", "may_be_away": may_be_away}
        assert probe.probe(endpoint)["state"] == state


def test_the_table_names_every_endpoint_and_the_verdict() -> None:
    results = [
        {"name": "nas", "tier": "NAS", "state": "DOWN", "seconds": 8.0, "evidence": ["no connection within 8.0 s"]},
        {
            "name": "chat",
            "tier": "LOCAL",
            "state": "HEALTHY",
            "seconds": 0.1,
            "evidence": ["/health: 200", "canary: 200"],
        },
    ]
    text = probe.table(results, probe.prognosis(results))
    assert text.splitlines() == [
        "TIER   ENDPOINT  STATE    TIME    EVIDENCE",
        "LOCAL  chat      HEALTHY  0.10 s  canary: 200",
        "NAS    nas       DOWN     8.00 s  no connection within 8.0 s",
        "",
        "Tiers: LOCAL HEALTHY, NAS DOWN",
        "Overall: DEGRADED",
    ]
