"""Pairwise judges: any OpenAI-compatible endpoint, or a Hugging Face reward model.

Each pair of answers is shown in both orders; the preference is the mean of the two verdicts, so a judge that always
names the first answer gives 0.5. Replies that can't be read as a verdict are asked for again, then counted as
unreadable, never as a tie. Every reply is kept in a JSONL cache under a hash of the request, so that a run that broke
goes on where it stopped and costs nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.evaluate.reward import reward_scores
from keepset.judging.endpoint import Endpoint, Reply
from keepset.judging.replies import parse_verdict, question

if TYPE_CHECKING:
    from keepset.model.encode import Encoder


@dataclass(frozen=True)
class Comparison:
    """One prompt with the model's answer and the baseline's."""

    instruction: str
    answer: str
    baseline: str


@dataclass
class Judgements:
    """What a judge said of n comparisons.

    Attributes:
        preference: (n,) in [0, 1], 1 = the model's answer is better; NaN where no order gave a verdict.
        verdicts: (n, 2), the model's answer shown first and second, 1 = it is better; NaN = unreadable.
        unreadable: replies without a verdict.
        requests: asked of the endpoint in this run.
        cached: taken from the cache.
        prompt_tokens: of this run's requests, as the endpoint counts them.
        completion_tokens: likewise.
        cost: in the currency of the prices given; 0 without prices.
    """

    preference: np.ndarray
    verdicts: np.ndarray
    unreadable: int = 0
    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def first_share(self) -> float:
        """Share of verdicts for the answer shown first: far from 0.5 is position bias."""
        shown = np.stack([self.verdicts[:, 0], 1 - self.verdicts[:, 1]])
        return float(np.nanmean(shown)) if np.isfinite(shown).any() else float("nan")

    @property
    def consistency(self) -> float:
        """Share of comparisons with both verdicts where both orders say the same."""
        both = np.isfinite(self.verdicts).all(axis=1)
        return float((self.verdicts[both, 0] == self.verdicts[both, 1]).mean()) if both.any() else float("nan")


@dataclass
class HttpJudge:
    """A judge behind an endpoint.

    Attributes:
        endpoint: where it answers; its `tries` hold for unreadable replies too.
        cache: JSONL file of replies; None keeps nothing.
        workers: requests at a time.
        price: (prompt, completion) cost of a million tokens.
    """

    endpoint: Endpoint
    cache: Path | None = None
    workers: int = 4
    price: tuple[float, float] = (0.0, 0.0)
    _replies: dict[str, Reply] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def compare(self, items: Sequence[Comparison]) -> Judgements:
        """Judge every comparison in both orders.

        Raises:
            KeepsetError: the endpoint refuses the request (wrong key, unknown model), or fails every time; what was
                judged so far is in the cache.
        """
        self._read_cache()
        stop = threading.Event()  # one failure ends the run: what is waiting isn't asked any more

        def both_orders(item: Comparison) -> list[Reply]:
            replies: list[Reply] = []
            for first, second in ((item.answer, item.baseline), (item.baseline, item.answer)):
                if stop.is_set():
                    return []
                try:
                    replies.append(self._verdict(question(item.instruction, first, second)))
                except BaseException:
                    stop.set()
                    raise
            return replies

        with ThreadPoolExecutor(max_workers=max(1, self.workers)) as pool:
            try:
                return self._judgements(list(pool.map(both_orders, items)))
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _judgements(self, replies: Sequence[Sequence[Reply]]) -> Judgements:
        """Read n comparisons' two replies each."""
        out = Judgements(np.full(len(replies), np.nan), np.full((len(replies), 2), np.nan))
        for i, pair in enumerate(replies):
            for k, reply in enumerate(pair):
                value = parse_verdict(reply.text)
                out.unreadable += value is None
                out.verdicts[i, k] = np.nan if value is None else (value if k == 0 else 1 - value)
                out.requests += reply.requests
                out.cached += not reply.requests
                out.prompt_tokens += reply.prompt_tokens if reply.requests else 0
                out.completion_tokens += reply.completion_tokens if reply.requests else 0
            read = out.verdicts[i][np.isfinite(out.verdicts[i])]
            out.preference[i] = read.mean() if read.size else np.nan
        out.cost = (out.prompt_tokens * self.price[0] + out.completion_tokens * self.price[1]) / 1e6
        return out

    def _verdict(self, prompt: str) -> Reply:
        """A reply from the cache, or asked for; unreadable ones are asked for again."""
        to = self.endpoint
        key = hashlib.sha256(json.dumps([to.url, to.model, to.max_tokens, prompt]).encode()).hexdigest()
        with self._lock:
            if key in self._replies:
                return replace(self._replies[key], requests=0)
        reply = Reply("")
        for attempt in range(to.tries):
            last = to.ask(prompt, 0.0 if attempt == 0 else 0.7)  # asked again at 0 it would say the same
            reply = Reply(last.text, reply.requests + last.requests, reply.prompt_tokens + last.prompt_tokens,
                          reply.completion_tokens + last.completion_tokens)  # fmt: skip
            if parse_verdict(reply.text) is not None:
                break
        with self._lock:
            self._replies[key] = reply
            if self.cache is not None:
                entry = {"key": key, "model": to.model, "reply": reply.text, **asdict(reply)}
                del entry["text"]
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return reply

    def _read_cache(self) -> None:
        if self.cache is None or not self.cache.exists():
            return
        for line in self.cache.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                if isinstance(entry["reply"], str):
                    self._replies[entry["key"]] = Reply(entry["reply"])
            except (ValueError, KeyError, TypeError):
                continue  # a line torn by a crash


@dataclass(frozen=True)
class RewardJudge:
    """A Hugging Face reward model (sequence classification with one label): the higher score wins.

    Attributes:
        model: AutoModelForSequenceClassification with num_labels = 1, or a PeftModel of one.
        encoder: the `keepset.model.encode.Encoder` of its tokenizer.
        heldout: its accuracy on held-out pairs (`keepset.train.reward.pair_accuracy`), to be shown beside its verdicts;
            None where it was not measured.
        batch_size: answers scored together.
    """

    model: Any
    encoder: Encoder
    heldout: dict[str, Any] | None = None
    batch_size: int = 8

    def scores(self, asked: Sequence[tuple[str, str]]) -> np.ndarray:
        """Rewards (n,) of n (prompt, answer).

        Raises:
            keepset.model.encode.RowRefused: the template refuses an answer, or it is too long (a cut answer is another
                answer).
        """
        rows = [
            self.encoder.encode_pair(
                [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
            ).input_ids
            for prompt, answer in asked
        ]
        return reward_scores(self.model, rows, batch_size=self.batch_size)

    def compare(self, items: Sequence[Comparison]) -> Judgements:
        """Judge every comparison; both orders say the same, as a score doesn't depend on what it is compared with.

        Raises:
            keepset.model.encode.RowRefused: see `scores`.
        """
        asked = [(item.instruction, text) for item in items for text in (item.answer, item.baseline)]
        ours, theirs = self.scores(asked).reshape(-1, 2).T
        preference = (ours > theirs) + 0.5 * (ours == theirs)
        return Judgements(preference, np.stack([preference, preference], axis=1))
