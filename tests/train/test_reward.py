"""The reward model learns, is scored on held-out pairs, and judges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import save_tiny, tiny_tokenizer
from keepset.errors import DataError, ModelError
from keepset.evaluate.reward import reward_scores
from keepset.judging.judge import Comparison, reward_judge
from keepset.model.encode import Encoder
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.reward import load_reward, pair_accuracy, train_reward
from keepset.train.training import Training
from tolerance import FORWARD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder, initializer_range=0.1)
    return ModelSpec(model_name_or_path=str(folder), device="cpu")


def pairs_of(spec, n, seed):
    """Chosen answers hold the word `thing`, rejected ones `user`."""
    encoder, rng = Encoder(tiny_tokenizer(), spec), np.random.default_rng(seed)
    out = []
    for i in range(n):
        filler = "".join(rng.choice(list("abcd"), 3))
        prompt = [{"role": "user", "content": f"{seed}{i}{filler}"}]
        sides = [[{"role": "assistant", "content": f"{filler} {word}"}] for word in ("thing", "user")]
        out.append(tuple(encoder.encode_pair(prompt, side) for side in sides))
    return out


def test_learns_judges_and_resumes_as_finished(base, tmp_path):
    train, heldout = pairs_of(base, 24, 1), pairs_of(base, 12, 2)
    args = TrainSpec(num_train_epochs=8, learning_rate=1e-2, per_device_train_batch_size=8)
    found = train_reward(Training(base, LoraSpec(lora_r=4), args), train, tmp_path / "r", heldout=heldout)
    assert found.train.losses[-1] < 0.2 < found.train.losses[0] and found.heldout["accuracy"]["value"] > 0.9
    assert json.loads((tmp_path / "r" / "heldout.json").read_text()) == found.heldout
    again = train_reward(Training(base, LoraSpec(lora_r=4), args), train, tmp_path / "r", heldout=heldout)
    assert again == found
    model, tokenizer = load_reward(base, tmp_path / "r")
    items = [
        Comparison("zz", "ab thing", "ab user"),
        Comparison("zz", "ab user", "ab thing"),
        Comparison("z", "x", "x"),
    ]
    verdicts = reward_judge(model, Encoder(tokenizer, base), items)
    assert verdicts.preference.tolist() == [1, 0, 0.5] and verdicts.consistency == 1
    with pytest.raises(ModelError, match="no reward model"):
        load_reward(base, tmp_path)


def test_scores_do_not_depend_on_batch(base, tmp_path):
    args = TrainSpec(num_train_epochs=1, full=True)
    train_reward(Training(base, LoraSpec(), args), pairs_of(base, 4, 1), tmp_path / "r")
    model, _ = load_reward(base, tmp_path / "r")
    rows = [side.input_ids for pair in pairs_of(base, 3, 3) for side in pair] + [np.array([5, 6, 7])]
    together, alone = reward_scores(model, rows, batch_size=8), reward_scores(model, rows, batch_size=1)
    assert np.allclose(together, alone, atol=4 * FORWARD)
    table = pair_accuracy(model, pairs_of(base, 5, 4))
    assert table["n"] == 5 and 0 <= table["accuracy"]["value"] <= 1


def test_refuses_leaking_heldout_pairs(base, tmp_path):
    pairs = pairs_of(base, 4, 1)
    with pytest.raises(DataError, match="1 of 1 held-out pairs are training pairs"):
        train_reward(Training(base, LoraSpec(), TrainSpec()), pairs, tmp_path, heldout=pairs[:1])
    with pytest.raises(DataError, match="no pairs"):
        train_reward(Training(base, LoraSpec(), TrainSpec()), [], tmp_path)
