"""The optimiser maps: against the step torch's AdamW really takes, against the formulas, and saved to disk."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from keepset.errors import ModelError, RecipeError  # noqa: E402
from keepset.features.adam import (  # noqa: E402
    AdamState,
    from_optimizer,
    load_adam,
    map_gradient,
    momentum_direction,
    parameter_map,
    save_adam,
)
from tolerance import FORWARD  # noqa: E402


def trained(steps: int, eps: float = 1e-8) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, betas=(0.9, 0.99), eps=eps, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(torch.randn(4, 5)) ** 2).sum().mul(1e-3).backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize(("steps", "eps"), [(1, 1e-8), (6, 1e-8), (6, 1e-3)])
def test_adam_is_the_step_torch_takes(steps: int, eps: float) -> None:
    layer, optimizer = trained(steps, eps)
    state = from_optimizer(optimizer, dict(layer.named_parameters()))
    assert state.step == steps
    g = torch.randn(3, 5) * 1e-2
    before = layer.weight.detach().double().clone()
    layer.weight.grad = g.clone()
    optimizer.step()
    step = (before - layer.weight.detach().double()) / 0.01
    got = map_gradient("adam", state, "weight", g).double()
    assert torch.allclose(got, step, rtol=1e-4, atol=2e-5)  # the weights' own rounding, over lr
    assert got.abs().max() > 0.1


def state(step: int = 5) -> AdamState:
    torch.manual_seed(1)
    return AdamState({"w": torch.randn(4, 6) * 1e-3}, {"w": torch.rand(4, 6) * 1e-6}, step, (0.9, 0.999), 1e-8)


def test_less_form_is_the_released_codes_formula() -> None:
    s, g = state(), torch.randn(4, 6) * 1e-3
    m, v, g64 = s.exp_avg["w"].double(), s.exp_avg_sq["w"].double(), g.double()
    want = (0.9 * m + 0.1 * g64) / torch.sqrt(0.999 * v + 0.001 * g64**2 + 1e-8)
    assert torch.allclose(map_gradient("adam-less", s, "w", g).double(), want, rtol=FORWARD)
    torch_form = map_gradient("adam", s, "w", g).double()
    assert not torch.allclose(torch_form / torch_form.norm(), want / want.norm(), rtol=0.05)


def test_precondition_is_linear_and_has_no_momentum() -> None:
    s, g = state(), torch.randn(4, 6)
    want = g.double() / ((s.exp_avg_sq["w"].double() / (1 - 0.999**5)).sqrt() + 1e-8)
    assert torch.allclose(map_gradient("precondition", s, "w", g).double(), want, rtol=FORWARD)
    assert torch.allclose(map_gradient("precondition", s, "w", 2 * g), 2 * map_gradient("precondition", s, "w", g))
    assert momentum_direction(parameter_map("precondition", s, "w", (4, 6))) is None


def test_sgd_and_sign_need_no_moments_and_leave_the_gradient_alone() -> None:
    g = torch.tensor([[1.5, -2.0, 0.0]])
    assert map_gradient("sgd", None, "w", g).equal(g)
    assert map_gradient("sign", None, "w", g).equal(torch.tensor([[1.0, -1.0, 0.0]]))
    assert g.equal(torch.tensor([[1.5, -2.0, 0.0]]))


@pytest.mark.parametrize("kind", ["adam", "adam-less"])
def test_momentum_direction_is_the_map_of_a_zero_gradient(kind: str) -> None:
    s = state()
    shared = momentum_direction(parameter_map(kind, s, "w", (4, 6)))
    assert shared is not None
    assert torch.allclose(shared.view(4, 6), map_gradient(kind, s, "w", torch.zeros(4, 6)))
    far = map_gradient(kind, s, "w", torch.full((4, 6), 1e-7))
    assert torch.cosine_similarity(far.view(-1), shared, dim=0) > 0.999


def test_untouched_coordinates_give_zero_not_nan() -> None:
    s = AdamState({"w": torch.zeros(1, 2)}, {"w": torch.zeros(1, 2)}, 3, eps=0.0)
    shared = momentum_direction(parameter_map("adam", s, "w", (1, 2)))
    assert shared is not None and shared.equal(torch.zeros(2))


def test_save_and_load(tmp_path) -> None:
    save_adam(state(), tmp_path)
    for where in (tmp_path, tmp_path / "adam.safetensors"):
        found = load_adam(where)
        assert (found.step, found.betas, found.eps) == (5, (0.9, 0.999), 1e-8)
        assert found.exp_avg["w"].equal(state().exp_avg["w"])
        assert found.exp_avg_sq["w"].equal(state().exp_avg_sq["w"])


def test_load_reads_step_and_betas_from_meta_json(tmp_path) -> None:
    save_file({"exp_avg.w": torch.ones(1), "exp_avg_sq.w": torch.ones(1)}, tmp_path / "adam.safetensors")
    with pytest.raises(ModelError, match="meta.json"):
        load_adam(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"step": 12, "betas": [0.8, 0.9], "eps": 1e-6, "mean_lr": 1e-4}))
    found = load_adam(tmp_path)
    assert (found.step, found.betas, found.eps) == (12, (0.8, 0.9), 1e-6)


def test_refusals(tmp_path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'adam'"):
        map_gradient("adm", None, "w", torch.zeros(1, 1))
    with pytest.raises(RecipeError, match="needs a checkpoint with Adam moments"):
        map_gradient("adam", None, "w", torch.zeros(1, 1))
    with pytest.raises(ModelError, match="did you mean 'w'"):
        map_gradient("adam", state(), "ww", torch.zeros(4, 6))
    with pytest.raises(ModelError, match=r"\(2, 2\) in the model but \(4, 6\)"):
        map_gradient("adam", state(), "w", torch.zeros(2, 2))
    with pytest.raises(ModelError, match="no Adam moments there"):
        load_adam(tmp_path)
    (tmp_path / "adam.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_adam(tmp_path)
    with pytest.raises(ModelError, match="at least one step"):
        map_gradient("precondition", state(0), "w", torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ('{"step": 1, "betas": [], "eps": 1}', "are no numbers"),
        ('{"step": 1, "betas": 3, "eps": 1}', "are no numbers"),
        ('{"step": "x", "betas": [0.9, 0.9], "eps": 1}', "are no numbers"),
        ('{"step": 1e999, "betas": [0.9, 0.9], "eps": 1}', "are no numbers"),
        ('{"step": 1}', "neither in its header"),
        ("[]", "neither in its header"),
        ("3", "neither in its header"),
        ("{", "not a readable safetensors file"),
    ],
)
def test_headers_of_any_form_are_told_in_one_line(tmp_path, about, told) -> None:
    tensors = {f"{kind}.w": torch.zeros(2) for kind in ("exp_avg", "exp_avg_sq")}
    save_file(tensors, tmp_path / "adam.safetensors", metadata={"adam": about})
    with pytest.raises(ModelError, match=told):
        load_adam(tmp_path)


def test_a_damaged_record_beside_the_moments_is_named(tmp_path) -> None:
    tensors = {f"{kind}.w": torch.zeros(2) for kind in ("exp_avg", "exp_avg_sq")}
    save_file(tensors, tmp_path / "adam.safetensors")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ModelError, match="meta.json: damaged"):
        load_adam(tmp_path)
