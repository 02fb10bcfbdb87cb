"""Raw and length-controlled win rates against known answers and AlpacaEval's own leaderboard."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from keepset.evaluate.statistics import spearman
from keepset.judging.win_rate import win_rate

DATA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"

# tatsu-lab/alpaca_eval @ 01f3cb2de42f, weighted_alpaca_eval_gpt4_turbo_leaderboard.csv: win rate, length-controlled.
OFFICIAL = {
    "vicuna-13b": (5.831, 9.222), "text_davinci_001": (2.764, 9.026), "alpaca-farm-ppo-sim-gpt4-20k": (3.450, 7.122),
    "alpaca-farm-ppo-human": (4.100, 6.419), "vicuna-7b": (4.163, 6.277), "alpaca-7b": (2.591, 5.875),
    "phi-2-sft": (3.978, 5.854), "minichat-3b": (3.007, 5.729), "gemma-2b-it": (3.402, 5.437), "phi-2": (2.350, 4.399),
    "chatglm2-6b": (2.762, 4.359), "falcon-7b-instruct": (2.147, 4.037), "oasst-sft-pythia-12b": (1.790, 3.270),
}  # fmt: skip


def judged(theta, phi, n=4000, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(300 + shift, 80, n), rng.normal(300, 80, n)
    t = np.tanh((ours - theirs) / (ours - theirs).std())
    return (rng.random(n) < 1 / (1 + np.exp(-theta - phi * t))).astype(float), ours, theirs


def test_a_judge_that_likes_length_is_seen_through():
    # Equal quality, answers longer by one standard deviation or more, a judge that pays for it.
    p, ours, theirs = judged(0.0, 1.5, shift=120)
    got = win_rate(p, ours, theirs, resamples=200)
    assert got.raw.value > 0.68 and got.raw.low > 0.6
    assert got.length_controlled.low < 0.5 < got.length_controlled.high
    assert got.length_effect == pytest.approx(1.5, abs=0.2) and got.length_pearson > 0.2


def test_a_judge_that_does_not_care_is_left_alone():
    p, ours, theirs = judged(0.8, 0.0, shift=120)
    got = win_rate(p, ours, theirs, resamples=200)
    assert got.length_controlled.value == pytest.approx(got.raw.value, abs=0.03)


def test_the_fit_is_the_minimum():
    p, ours, theirs = judged(0.3, 0.7, n=60)
    p = 0.1 + 0.8 * p  # soft judgements
    d = ours - theirs
    t = np.tanh(d / d.std())

    def loss(b):
        z = b[0] + b[1] * t
        return np.sum(np.logaddexp(0, z) - p * z) + 0.5 * 2.0 * b[1] ** 2

    best = optimize.minimize(loss, [0, 0], method="BFGS", options={"gtol": 1e-10}).x
    got = win_rate(p, ours, theirs, ridge=2.0, resamples=20)
    assert got.length_effect == pytest.approx(best[1], abs=2e-3)
    assert got.length_controlled.value == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-3)


def test_counts_and_corners():
    got = win_rate([1, 0.5, 0, 1], [10, 10, 10, 20], [5, 10, 10, 10], resamples=50)
    assert (got.wins, got.ties, got.losses, got.longer) == (2, 1, 1, 0.5) and got.raw.value == 0.625
    json.dumps(got.as_dict(), allow_nan=False)
    same = win_rate([1, 0, 1, 1], [7] * 4, [7] * 4, resamples=50)
    assert same.length_controlled.value == pytest.approx(0.75, abs=1e-3) and same.length_pearson is None
    never = win_rate([0.0] * 20, range(20), [5] * 20, resamples=50)
    assert 0 <= never.length_controlled.value < 0.01
    for bad in ([1.5, 1], [np.nan, 1], [1]):
        with pytest.raises(ValueError):
            win_rate(bad, [1, 2], [3, 4])


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="AlpacaEval's stored judgements are not here")
def test_official_leaderboard():
    zstandard = pytest.importorskip("zstandard")

    def read(name):
        with (DATA / f"{name}.jsonl.zst").open("rb") as f:
            text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), encoding="utf-8")
            return [json.loads(line) for line in text]

    baseline = {int(r["id"]): len(r["output_gpt4_1106_preview"]) for r in read("instructions")}
    lengths = {(int(r["id"]), r["model"]): len(r["output"]) for r in read("model_outputs")}
    rows = {m: [] for m in OFFICIAL}
    for r in read("judge_preferences"):
        if r["annotator"] == "weighted_alpaca_eval_gpt4_turbo":
            i = int(r["id"])
            rows[r["model"]].append((r["preference"] - 1, lengths[i, r["model"]], baseline[i]))
    got = {m: win_rate(*np.array(r).T, resamples=100) for m, r in rows.items()}
    raw = [100 * got[m].raw.value for m in OFFICIAL]
    controlled = [100 * got[m].length_controlled.value for m in OFFICIAL]
    official_raw, official = zip(*OFFICIAL.values(), strict=True)
    assert raw == pytest.approx(official_raw, abs=0.01)
    assert spearman(controlled, official) > 0.88 > 0.76 > spearman(raw, official)
    assert np.mean(np.abs(np.array(controlled) - official)) < 1.2
