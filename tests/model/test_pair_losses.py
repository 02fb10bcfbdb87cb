"""Pair losses against TRL's, finite differences and hand-worked numbers; training with them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import random_rows, tiny_lora, tiny_model, tiny_tokenizer
from keepset.errors import DataError, RecipeError
from keepset.model import pair_losses as losses
from keepset.model.pack import pack
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train import preference
from keepset.train.preference import PaddedPairs, PairCollator, PairLoss, side_logps, train_dpo
from keepset.train.training import Base, Training
from tolerance import BACKWARD, FORWARD, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(m=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: -(torch.rand(m, generator=g, dtype=torch.float64) * 40 + 1)  # noqa: E731
    policy, reference = (draw(), draw()), (draw(), draw())
    counts = tuple(torch.randint(1, 30, (m,), generator=g).double() for _ in range(2))
    return policy, reference, counts


def test_by_hand():
    t = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    policy, reference, counts = (t(-8.0), t(-6.0)), (t(-10.0), t(-5.0)), (t(4.0), t(2.0))
    # log-ratios +2 and -1
    assert losses.dpo_loss(*policy, *reference, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    # S_w = 1 - 8/10, S_l = 1 - 6/5
    assert losses.davir_logit(*policy, *reference).item() == pytest.approx(0.2 + 0.2)
    assert losses.davir_dpo_loss(*policy, *reference, beta=10).item() == pytest.approx(math.log(1 + math.exp(-4)))
    # means +.5 and -.5
    assert losses.ipo_loss(*policy, *reference, *counts, beta=0.1).item() == pytest.approx((1 - 5) ** 2)
    assert losses.dpo_mean_loss(*policy, *reference, *counts, beta=2).item() == pytest.approx(
        math.log(1 + math.exp(-2))
    )
    smoothed = losses.dpo_loss(*policy, *reference, beta=0.5, label_smoothing=0.25).item()
    assert smoothed == pytest.approx(0.75 * math.log(1 + math.exp(-1.5)) + 0.25 * math.log(1 + math.exp(1.5)))
    # -2 against -3
    assert losses.simpo_loss(*policy, *counts, beta=2, gamma=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


@pytest.mark.parametrize("name", losses.NAMES)
def test_gradient_against_finite_differences(name):
    policy, reference, counts = numbers()
    leaf = torch.stack(policy).requires_grad_()
    f = lambda x: losses.pair_loss(name, (x[0], x[1]), reference, counts, beta=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: f(x).sum(), (leaf,), eps=1e-6, atol=1e-8)
    # ... and every loss falls when the chosen side gains (IPO: as long as its margin is below 1/(2β)).
    if name != "ipo":
        grad = torch.autograd.grad(f(leaf).sum(), leaf)[0]
        assert (grad[0] < 0).all() and (grad[1] > 0).all()


def test_at_the_start():
    policy, _, counts = numbers()
    for name in ("dpo", "davir", "dpo_mean"):
        got = losses.pair_loss(name, policy, policy, counts, beta=3.0)
        assert got.tolist() == pytest.approx([math.log(2)] * 6)
    assert losses.pair_loss("ipo", policy, policy, counts, beta=0.5).tolist() == pytest.approx([1.0] * 6)


def test_davir_is_the_difference_of_scores_and_the_same_for_means():
    from keepset.methods.davir import davir

    policy, reference, counts = numbers()
    score = [torch.from_numpy(davir(-reference[k].numpy(), -policy[k].numpy())) for k in range(2)]
    assert torch.allclose(losses.davir_logit(*policy, *reference), score[0] - score[1])
    means = losses.davir_logit(*(p / n for p, n in zip(policy, counts, strict=True)),
                               *(r / n for r, n in zip(reference, counts, strict=True)))  # fmt: skip
    assert torch.allclose(means, losses.davir_logit(*policy, *reference))


def test_davir_denominators_carry_no_gradient():
    policy, reference, _ = numbers()
    held = [r.clone().requires_grad_() for r in reference]
    moved = [p.clone().requires_grad_() for p in policy]
    losses.davir_dpo_loss(*moved, *held, beta=2.0).sum().backward()
    assert all(h.grad is None for h in held) and all(m.grad.abs().min() > 0 for m in moved)


def pairs_of(n=6):
    rows = random_rows(2 * n, longest=14)
    return [(rows[2 * i], rows[2 * i + 1]) for i in range(n)]


@pytest.mark.parametrize(("ours", "theirs"), preference.TRL_NAMES.items())
def test_loss_and_gradient_against_trl(ours, theirs):
    """TRL's own `_compute_loss` on padded rows, against packed parts of at most 40 tokens."""
    from collections import defaultdict

    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    pairs = pairs_of()
    model = tiny_lora(tiny_model())
    rng = np.random.default_rng(0)
    examples = [
        {
            "chosen_ids": c.input_ids, "chosen_labels": np.where(c.supervised, c.input_ids, -100),
            "rejected_ids": r.input_ids, "rejected_labels": np.where(r.supervised, r.input_ids, -100),
            "ref_chosen_logps": -rng.uniform(5, 40), "ref_rejected_logps": -rng.uniform(5, 40),
        }
        for c, r in pairs
    ]  # fmt: skip
    batch = PairCollator(packed=True, pad_token_id=2, micro_tokens=40)(examples)
    assert len(batch["parts"]) > 1 and batch["n_items"] == 6
    total = 0.0
    for part in batch["parts"]:
        logps, counts = side_logps(model, part.batch)
        reference = part.reference.float().unbind(1)
        loss = losses.pair_loss(ours, logps, reference, counts, beta=0.3).sum() / 6
        loss.backward()
        total += loss.item()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[theirs], loss_weights=[1.0], beta=0.3, label_smoothing=0.0,
        use_weighting=False, _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, model, PaddedPairs(2)(examples), return_outputs=False)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=4 * FORWARD)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(mine[name], parameter.grad, rtol=1e-3, atol=FORWARD), name


def test_side_logps_keeps_pairs_together():
    rows = random_rows(6, longest=14)
    model = tiny_model()
    order = np.argsort([-len(r.input_ids) for r in rows], kind="stable")
    got, counts = side_logps(model, pack(rows, order, packed=True))
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        want = logp[torch.from_numpy(row.supervised[1:])].sum().item()
        assert got[i % 2][i // 2].item() == pytest.approx(want, rel=4 * FORWARD)
        assert counts[i % 2][i // 2].item() == row.supervised.sum()


LORA = LoraSpec(lora_r=4, lora_alpha=8)


def fit(out, pairs=None, *, loss="dpo", beta=0.5, **changes):
    args = TrainSpec(
        **{"num_train_epochs": 8, "per_device_train_batch_size": 3, "learning_rate": 2e-2, "warmup_ratio": 0, **changes}
    )
    base = Base("", lambda: (tiny_model(), tiny_tokenizer()))
    training = Training(ModelSpec(device="cpu"), LORA, args)
    return train_dpo(training, pairs_of() if pairs is None else pairs, out, PairLoss.of(loss, beta), base=base)


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.5), ("davir", 20.0)])
def test_training_starts_at_log_2_and_learns(tmp_path, loss, beta):
    from keepset.evaluate.preference import margins, pair_logps
    from keepset.model.adapters import attached

    pairs = pairs_of()
    result = fit(tmp_path / "out", pairs, loss=loss, beta=beta)
    assert result.losses[0] == pytest.approx(math.log(2), abs=4 * FORWARD)
    assert result.losses[-1] < 0.3 and result.steps == 16
    assert result.tokens == 8 * sum(len(c.input_ids) + len(r.input_ids) for c, r in pairs)
    model = tiny_model()
    base = pair_logps(model, pairs)
    with attached(model, tmp_path / "out") as trained:
        got = margins(pair_logps(trained, pairs), base)
    assert (got["implicit_sum"] > 0).all() and (got["implicit_relative"] > 0).mean() > 0.9


def test_full_training_and_trls_own_losses(tmp_path):
    full = fit(tmp_path / "full", full=True, learning_rate=1e-3, num_train_epochs=3)
    assert full.losses[0] == pytest.approx(math.log(2), abs=4 * FORWARD) and full.losses[-1] < full.losses[0]
    assert (tmp_path / "full" / "model.safetensors").exists()
    hinge = fit(tmp_path / "hinge", loss="hinge", num_train_epochs=2)
    assert hinge.losses[0] == pytest.approx(1.0, abs=1e-4) and hinge.steps == 4
    # TRL's step and ours, same loss, same seed.
    theirs = fit(tmp_path / "trl", num_train_epochs=2, extra={"ld_alpha": 1.0})
    ours = fit(tmp_path / "ours", num_train_epochs=2)
    assert ours.losses == pytest.approx(theirs.losses, rel=4 * BACKWARD)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "trl"))
    assert all(torch.allclose(a[k], b[k], atol=trained(2e-2, ours.steps)) for k in a)


def test_refusals(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'davir'"):
        fit(tmp_path, loss="davr")
    with pytest.raises(DataError, match="no rows"):
        fit(tmp_path, [])
    with pytest.raises(RecipeError, match="one process"):
        fit(tmp_path, loss="davir", extra={"ld_alpha": 0.5})
    with pytest.raises(RecipeError, match="did you mean"):
        fit(tmp_path, extra={"label_smothing": 0.1})
