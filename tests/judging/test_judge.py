"""Reading verdicts, and a local endpoint that fails, rate-limits and lies."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from keepset.errors import KeepsetError
from keepset.judging.judge import Comparison, HttpJudge, parse_verdict

A, B, TIE, NONE = 1.0, 0.0, 0.5, None
REPLIES = [
    ("Verdict: A", A),
    ("Verdict: B", B),
    ("Verdict: tie", TIE),
    ("verdict: a", A),
    ("VERDICT: B.", B),
    ("**Verdict: B**", B),
    ("**Verdict:** A", A),
    ("Verdict: **A**", A),
    ("Verdict: `B`", B),
    ("Verdict: [A]", A),
    ("Verdict: (B)", B),
    ("Verdict: \"A\"", A),
    ("Verdict - B", B),
    ("Verdict = A", A),
    ("Verdict:\nB", B),
    ("Verdict: Answer A", A),
    ("Verdict: answer_B", B),
    ("Verdict: Response B is better", B),
    ("The verdict is A.", A),
    ("Final answer: B", B),
    ("Winner: A", A),
    ("[[A]]", A),
    ("[[B]]", B),
    ("[[C]]", TIE),
    ("My final verdict is: [[ b ]]", B),
    ("Answer A is longer, Answer B is right. [[B]]", B),
    ("[[A]] at first sight, but on reflection [[B]]", NONE),
    ("A", A),
    ("B.", B),
    (" **b** ", B),
    ("Answer A", A),
    ("tie", TIE),
    ("Tie.", TIE),
    ("Verdict: tied", TIE),
    ("Verdict: both", TIE),
    ("Verdict: neither", TIE),
    ("Verdict: draw", TIE),
    ("Answer A is wordy. Answer B is to the point.\n\nVerdict: B", B),
    ("Verdict: A\n\nBecause answer B does not answer the question.", A),
    ("One might say Verdict: A. But it is wrong.\nVerdict: B", B),
    ("Verdict: A or B", NONE),
    ("Verdict: A/B", NONE),
    ("Answer A is better than the other.", A),
    ("Answer B is clearly the better one.", B),
    ("I would prefer answer B here", B),
    ("Answer A is better in style, Answer B is better in content.", NONE),
    ("A is a letter of the alphabet and so is B.", NONE),
    ("I can't decide without more context.", NONE),
    ("", NONE),
    ("   \n ", NONE),
    ("<think>Verdict: A? no, B is better</think>\nVerdict: B", B),
    ("<think>Verdict: A, I think, but", NONE),
    ("As an AI model I cannot compare.", NONE),
    ("Verdict: Apple", NONE),
    ("Both answers are bad.", NONE),
    ("判定：A", NONE),
    ("{\"verdict\": \"A\"}", A),
    ("Step 1: read.\nStep 2: compare.\nB", B),
    ("Answer: Both fine\nVerdict: Tie", TIE),
]  # fmt: skip


def test_there_are_at_least_fifty_awkward_replies():
    assert len(REPLIES) >= 50


@pytest.mark.parametrize(("reply", "verdict"), REPLIES)
def test_parsing(reply, verdict):
    assert parse_verdict(reply) == verdict


class Endpoint:
    """A chat-completions server on 127.0.0.1 whose behaviour a test scripts."""

    def __init__(self, behave):
        self.seen, self.keys, lock = [], [], threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.seen.append(body)
                    endpoint.keys.append(self.headers.get("Authorization"))
                    number = len(endpoint.seen)
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


def judge(endpoint, **options):
    slept = []
    made = HttpJudge(endpoint.url, "m", **{"workers": 1, "pause": 0.1, "sleep": slept.append, **options})
    return made, slept


def test_both_orders_cost_and_cache(tmp_path):
    with Endpoint(lambda n, body: says("Verdict: " + honest(body))) as endpoint:
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
    with Endpoint(lambda n, body: says("Verdict: A")) as endpoint:
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

    with Endpoint(behave) as endpoint:
        made, slept = judge(endpoint)
        got = made.compare(ITEMS[:1])
    assert got.preference.tolist() == [1] and got.requests == 6
    assert len(slept) == 4 and slept[1] == 7.0  # the server's own wish
    assert 0.05 <= slept[0] <= 0.15 and 0.2 <= slept[2] <= 0.6 and 0.4 <= slept[3] <= 1.2


def test_gives_up_and_keeps_what_was_judged(tmp_path):
    with Endpoint(lambda n, body: says("Verdict: A") if n <= 2 else (503, b"", {})) as endpoint:
        made, slept = judge(endpoint, cache=tmp_path / "j.jsonl", tries=3)
        with pytest.raises(KeepsetError, match="gave up after 3 tries, the last: HTTP 503"):
            made.compare(ITEMS)
        assert len(slept) == 2 and len((tmp_path / "j.jsonl").read_text().splitlines()) == 2


def test_a_refusal_is_not_retried(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with Endpoint(lambda n, body: (401, b'{"error": "bad key"}', {})) as endpoint:
        made, slept = judge(endpoint, key_variable="MY_KEY")
        with pytest.raises(KeepsetError, match="refused .401.*bad key") as caught:
            made.compare(ITEMS)
        assert endpoint.keys[0] == "Bearer secret-key" and "secret" not in str(caught.value) and not slept


def test_nothing_listens_and_odd_addresses():
    made = HttpJudge("http://127.0.0.1:9", "m", tries=2, workers=1, sleep=lambda s: None, timeout=2)
    with pytest.raises(KeepsetError, match="gave up after 2 tries"):
        made.compare(ITEMS[:1])
    with pytest.raises(KeepsetError, match="not an http"):
        HttpJudge("file:///etc", "m", tries=1).compare(ITEMS[:1])


def test_unreadable_replies_are_asked_again_and_then_counted():
    def rambling(n, body):
        return says("Hmm, hard to say.") if "q1" in body["messages"][0]["content"] else says("Verdict: " + honest(body))

    with Endpoint(rambling) as endpoint:
        got = judge(endpoint, tries=3)[0].compare(ITEMS)
    assert np.isnan(got.preference[0]) and got.preference[1:].tolist() == [0, 0.5]
    assert got.unreadable == 2 and got.requests == 2 * 3 + 4
    assert {b["temperature"] for b in endpoint.seen} == {0.0, 0.7}
    with Endpoint(lambda n, body: says("Hm." if n % 2 else "Verdict: " + honest(body))) as endpoint:
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

    with Endpoint(behave) as endpoint:
        got = judge(endpoint)[0].compare(ITEMS)
    assert got.preference.tolist() == [1, 0, 0.5] and got.prompt_tokens == 0 and got.cost == 0


def test_a_slow_endpoint_times_out():
    release = threading.Event()

    def behave(n, body):
        if n == 1:
            release.wait(5)
        return says("Verdict: " + honest(body))

    with Endpoint(behave) as endpoint:
        got = judge(endpoint, timeout=0.3)[0].compare(ITEMS[:1])
        release.set()
    assert got.preference.tolist() == [1] and got.requests == 3


def test_an_endpoint_that_hangs_is_given_up_and_the_rest_asked_later(tmp_path):
    release, hangs = threading.Event(), [True]

    def behave(n, body):
        if n > 2 and hangs[0]:
            release.wait(20)
        return says("Verdict: " + honest(body))

    with Endpoint(behave) as endpoint:
        made, slept = judge(endpoint, timeout=0.2, tries=3, cache=tmp_path / "j.jsonl")
        with pytest.raises(KeepsetError, match="gave up after 3 tries, the last: TimeoutError: timed out") as caught:
            made.compare(ITEMS)
        assert "\n" not in str(caught.value) and len(slept) == 2
        hangs[0] = False
        release.set()
        asked = len(endpoint.seen)
        again = judge(endpoint, cache=tmp_path / "j.jsonl")[0].compare(ITEMS)
        assert again.preference.tolist() == [1, 0, 0.5]
        assert (again.cached, again.requests, len(endpoint.seen) - asked) == (2, 4, 4)


@pytest.mark.parametrize("flood", [False, True])
def test_an_endpoint_that_drips_or_floods_is_given_up(flood, monkeypatch):
    """Each byte comes in time, the reply never ends; or it is larger than any verdict."""
    monkeypatch.setattr("keepset.judging.judge.LARGEST_REPLY", 1 << 16)
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
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
    made = HttpJudge(url, "m", workers=1, tries=2, timeout=0.3, sleep=lambda seconds: None)
    with pytest.raises(
        KeepsetError, match="gave up after 2 tries, the last: " + ("ValueError" if flood else "Timeout")
    ):
        made.compare(ITEMS[:1])
    stop.set()
    server.shutdown()
    server.server_close()
