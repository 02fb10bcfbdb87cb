"""Judging by a local endpoint that fails, rate-limits and lies."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from keepset.errors import KeepsetError
from keepset.judging.endpoint import Endpoint
from keepset.judging.judge import Comparison, HttpJudge


class Server:
    """A chat-completions server on 127.0.0.1 whose behaviour a test scripts."""

    def __init__(self, behave):
        self.seen, self.keys, self.elsewhere, lock = [], [], [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with lock:
                    server.elsewhere.append(self.path)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                    number = len(server.seen)
                answer = behave(number, body)
                status, payload, headers = answer if isinstance(answer, tuple) else (200, answer, {})
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def says(text, prompt_tokens=100, completion_tokens=5):
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def honest(body):
    """Prefers the answer that holds the word `good`."""
    text = body["messages"][0]["content"]
    first = text.split("<answer_A>")[1].split("</answer_A>")[0]
    second = text.split("<answer_B>")[1].split("</answer_B>")[0]
    return "tie" if ("good" in first) == ("good" in second) else "A" if "good" in first else "B"


ITEMS = [Comparison("q1", "good", "bad"), Comparison("q2", "bad {first}", "good"), Comparison("q3", "bad", "worse")]


def judge(server, cache=None, price=(0.0, 0.0), workers=1, **options):
    slept = []
    endpoint = Endpoint(server.url, "m", **{"pause": 0.1, "sleep": slept.append, **options})
    return HttpJudge(endpoint, cache=cache, price=price, workers=workers), slept


def test_both_orders_cost_and_cache(tmp_path):
    with Server(lambda n, body: says("Verdict: " + honest(body))) as endpoint:
        made, _ = judge(endpoint, cache=tmp_path / "c" / "judge.jsonl", price=(10.0, 20.0), workers=3)
        got = made.compare(ITEMS)
        assert got.preference.tolist() == [1, 0, 0.5] and got.consistency == 1 and got.first_share == 0.5
        assert (got.requests, got.cached, got.prompt_tokens, got.completion_tokens) == (6, 0, 600, 30)
        assert got.cost == pytest.approx(600 * 10e-6 + 30 * 20e-6)
        assert {b["temperature"] for b in endpoint.seen} == {0.0}
        assert any("bad {first}" in b["messages"][0]["content"] for b in endpoint.seen)
        # A torn last line costs one request, nothing else is asked again.
        lines = (tmp_path / "c" / "judge.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "c" / "judge.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20] + "\n")
        again, _ = judge(endpoint, cache=tmp_path / "c" / "judge.jsonl", price=(10.0, 20.0))
        repeat = again.compare(ITEMS)
        assert repeat.preference.tolist() == [1, 0, 0.5] and (repeat.requests, repeat.cached) == (1, 5)
        assert len(endpoint.seen) == 7


def test_position_bias_is_seen_and_cancelled():
    with Server(lambda n, body: says("Verdict: A")) as endpoint:
        got = judge(endpoint)[0].compare(ITEMS)
    assert got.preference.tolist() == [0.5] * 3 and got.first_share == 1 and got.consistency == 0


def test_failures_and_rate_limits_are_waited_out():
    def behave(n, body):
        if n == 1:
            return 500, b"oops", {}
        if n == 2:
            return 429, b"slow down", {"Retry-After": "7"}
        if n == 3:
            return 200, b"<html>not json", {}
        if n == 4:
            return 200, {"choices": []}, {}
        return says("Verdict: " + honest(body))

    with Server(behave) as endpoint:
        made, slept = judge(endpoint)
        got = made.compare(ITEMS[:1])
    assert got.preference.tolist() == [1] and got.requests == 6
    assert len(slept) == 4 and slept[1] == 7.0  # the server's own wish
    assert 0.05 <= slept[0] <= 0.15 and 0.2 <= slept[2] <= 0.6 and 0.4 <= slept[3] <= 1.2


def test_gives_up_and_keeps_what_was_judged(tmp_path):
    with Server(lambda n, body: says("Verdict: A") if n <= 2 else (503, b"", {})) as endpoint:
        made, slept = judge(endpoint, cache=tmp_path / "j.jsonl", tries=3)
        with pytest.raises(KeepsetError, match="gave up after 3 tries, the last: HTTP 503"):
            made.compare(ITEMS)
        assert len(slept) == 2 and len((tmp_path / "j.jsonl").read_text().splitlines()) == 2


def test_a_refusal_is_not_retried(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with Server(lambda n, body: (401, b'{"error": "bad key"}', {})) as endpoint:
        made, slept = judge(endpoint, key_variable="MY_KEY")
        with pytest.raises(KeepsetError, match="refused .401.*bad key") as caught:
            made.compare(ITEMS)
        assert endpoint.keys[0] == "Bearer secret-key" and "secret" not in str(caught.value) and not slept


def test_nothing_listens_and_odd_addresses():
    made = HttpJudge(Endpoint("http://127.0.0.1:9", "m", tries=2, sleep=lambda s: None, timeout=2), workers=1)
    with pytest.raises(KeepsetError, match="gave up after 2 tries"):
        made.compare(ITEMS[:1])
    with pytest.raises(KeepsetError, match="not an http"):
        HttpJudge(Endpoint("file:///etc", "m", tries=1)).compare(ITEMS[:1])


def test_unreadable_replies_are_asked_again_and_then_counted():
    def rambling(n, body):
        return says("Hmm, hard to say.") if "q1" in body["messages"][0]["content"] else says("Verdict: " + honest(body))

    with Server(rambling) as endpoint:
        got = judge(endpoint, tries=3)[0].compare(ITEMS)
    assert np.isnan(got.preference[0]) and got.preference[1:].tolist() == [0, 0.5]
    assert got.unreadable == 2 and got.requests == 2 * 3 + 4
    assert {b["temperature"] for b in endpoint.seen} == {0.0, 0.7}
    with Server(lambda n, body: says("Hm." if n % 2 else "Verdict: " + honest(body))) as endpoint:
        got = judge(endpoint)[0].compare(ITEMS)
    assert got.preference.tolist() == [1, 0, 0.5] and got.unreadable == 0


def test_lies_about_usage_and_content():
    lies = [{"prompt_tokens": -5, "completion_tokens": "many"}, {"prompt_tokens": True}, None, "none", {}]

    def behave(n, body):
        reply = says("Verdict: " + honest(body))
        reply["usage"] = lies[n % len(lies)]
        if n == 1:
            reply["choices"][0]["message"]["content"] = None
        return reply

    with Server(behave) as endpoint:
        got = judge(endpoint)[0].compare(ITEMS)
    assert got.preference.tolist() == [1, 0, 0.5] and got.prompt_tokens == 0 and got.cost == 0


def test_a_slow_endpoint_times_out():
    release = threading.Event()

    def behave(n, body):
        if n == 1:
            release.wait(5)
        return says("Verdict: " + honest(body))

    with Server(behave) as endpoint:
        got = judge(endpoint, timeout=0.3)[0].compare(ITEMS[:1])
        release.set()
    assert got.preference.tolist() == [1] and got.requests == 3


def test_an_endpoint_that_hangs_is_given_up_and_the_rest_asked_later(tmp_path):
    release, hangs = threading.Event(), [True]

    def behave(n, body):
        if n > 2 and hangs[0]:
            release.wait(20)
        return says("Verdict: " + honest(body))

    with Server(behave) as endpoint:
        made, slept = judge(endpoint, timeout=0.8, tries=3, cache=tmp_path / "j.jsonl")
        with pytest.raises(KeepsetError, match="gave up after 3 tries, the last: TimeoutError: timed out") as caught:
            made.compare(ITEMS)
        assert "\n" not in str(caught.value) and len(slept) == 2
        hangs[0] = False
        release.set()
        asked = len(endpoint.seen)
        again = judge(endpoint, cache=tmp_path / "j.jsonl")[0].compare(ITEMS)
        assert again.preference.tolist() == [1, 0, 0.5]
        assert (again.cached, again.requests, len(endpoint.seen) - asked) == (2, 4, 4)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_and_the_prompt_go_nowhere_else(status, monkeypatch):
    """urllib follows 301 to 303 and takes the Authorization header along, to any host."""
    monkeypatch.setenv("MY_KEY", "secret-key")
    with Server(lambda n, body: says("Verdict: A")) as other:
        there = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        with Server(lambda n, body: (status, b"", {"Location": there})) as server:
            made, slept = judge(server, key_variable="MY_KEY")
            with pytest.raises(KeepsetError, match=f"redirects .{status}. to {there}; name the address") as caught:
                made.compare(ITEMS)
        assert len(server.seen) == 1 and server.keys == ["Bearer secret-key"] and not slept
        assert other.seen == other.elsewhere == [] and "secret" not in str(caught.value)


def test_replies_that_are_no_http_or_nest_too_deep_are_asked_for_again():
    import socket

    def once(listener):
        with listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"hello\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=once, args=(listener,), daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", tries=1)
        with pytest.raises(KeepsetError, match="gave up after 1 tries, the last: BadStatusLine"):
            endpoint.ask("q", 0.0)
    with Server(lambda n, body: b"[" * 200_000 if n == 1 else says("Verdict: A")) as server:
        assert judge(server)[0].compare(ITEMS[:1]).requests == 3


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("flood", [False, True])
def test_an_endpoint_that_drips_or_floods_is_given_up(flood, status, monkeypatch):
    """Each byte comes in time, the reply never ends; or it is larger than any verdict."""
    monkeypatch.setattr("keepset.judging.endpoint.LARGEST_REPLY", 1 << 16)
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.end_headers()
            while not stop.wait(0 if flood else 0.05):
                try:
                    self.wfile.write(b" " * (4096 if flood else 1))
                except OSError:
                    return

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    made = HttpJudge(Endpoint(url, "m", tries=2, timeout=0.3, sleep=lambda seconds: None), workers=1)
    with pytest.raises(
        KeepsetError, match="gave up after 2 tries, the last: " + ("ValueError" if flood else "Timeout")
    ):
        made.compare(ITEMS[:1])
    stop.set()
    server.shutdown()
    server.server_close()
