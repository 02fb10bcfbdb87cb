"""Maps from an example's gradient g to the direction an optimiser would step in, and Adam's saved moments.

With m, v the moments before the step, t the steps taken so far, b1, b2 the betas and ε
Adam's epsilon, all elementwise:

    sgd           Γ = g
    adam          Γ = m̂ / (√v̂ + ε),
                  m̂ = (b1·m + (1−b1)·g) / (1 − b1^(t+1)),  v̂ = (b2·v + (1−b2)·g²) / (1 − b2^(t+1))
                  the step that `torch.optim.AdamW` takes next on this example alone, without −lr and weight decay
    adam-less     Γ = (b1·m + (1−b1)·g) / √(b2·v + (1−b2)·g² + ε)
                  the released LESS and ROSE code (princeton-nlp/LESS `collect_grad_reps.py`): ε inside the root, no
                  bias correction; with LoRA's small v this ε flattens most coordinates
    precondition  Γ = g / (√(v / (1 − b2^t)) + ε)
                  Adam's second moment only: linear in g, no momentum term shared by all examples
    sign          Γ = sign(g)

The two Adam forms add the same vector, the map of g = 0, to every example; `momentum_direction` returns it, so that its
share can be measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keepset.errors import ModelError, RecipeError, did_you_mean
from keepset.runfolder import layout

GradientMap = Literal["sgd", "adam", "adam-less", "precondition", "sign"]


@dataclass(frozen=True)
class AdamState:
    """Adam's moments at a checkpoint.

    Attributes:
        exp_avg: first moment m by parameter name (those of `PeftModel.named_parameters()`).
        exp_avg_sq: second moment v by parameter name.
        step: optimiser steps taken so far, t.
        betas: decay of both moments.
        eps: Adam's epsilon.
    """

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class ParameterMap:
    """One parameter's map, its constants multiplied out once: Γ = (shift + gain·g) / (√(base + gain2·g²) + eps).

    Attributes:
        kind: the map's name.
        shift: (p,) the momentum term, or None.
        base: (p,) the second moment's part of the root; for `precondition` the reciprocal denominator.
        gain: factor of g above.
        gain2: factor of g² in the root.
        eps: added after the root; 0 where it stands inside (then part of `base`).
    """

    kind: GradientMap
    shift: Tensor | None = None
    base: Tensor | None = None
    gain: float = 1.0
    gain2: float = 0.0
    eps: float = 0.0

    def apply_(self, g: Tensor, scratch: Tensor, start: int, stop: int) -> Tensor:
        """Map gradients in place.

        `g` (n, stop − start), float32, holds the gradients of the coordinates start:stop and is overwritten and
        returned; `scratch` has room for as many numbers. Returns g.
        """
        if self.kind == "sgd":
            return g
        if self.kind == "sign":
            return g.sign_()
        assert self.base is not None
        if self.kind == "precondition":
            return g.mul_(self.base[start:stop])
        assert self.shift is not None
        root = scratch[: g.numel()].view(g.shape)
        torch.addcmul(self.base[start:stop], g, g, value=self.gain2, out=root)
        root.sqrt_()
        if self.eps:
            root.add_(self.eps)
        torch.add(self.shift[start:stop], g, alpha=self.gain, out=g)
        return g.div_(root)


def parameter_map(
    kind: str,
    state: AdamState | None,
    name: str,
    shape: torch.Size | tuple[int, ...],
    device: torch.device | str | None = None,
) -> ParameterMap:
    """Prepare the map of one parameter.

    `sgd` and `sign` need no moments; `shape` is checked against the moments'; the default device is where those are.

    Raises:
        RecipeError: unknown kind, or a kind that needs moments without any.
        ModelError: the moments lack this parameter or have another shape.
    """
    check_map(kind, state)
    if kind == "sgd" or kind == "sign":
        return ParameterMap(kind)  # type: ignore[arg-type]
    assert state is not None
    m, v = state.exp_avg.get(name), state.exp_avg_sq.get(name)
    if m is None or v is None:
        hint = did_you_mean(name, list(state.exp_avg))
        raise ModelError(f"the Adam moments hold nothing for '{name}'{hint}: they were saved for another adapter")
    if m.shape != tuple(shape) or v.shape != tuple(shape):
        raise ModelError(f"'{name}' is {tuple(shape)} in the model but {tuple(m.shape)} in the Adam moments")
    m, v = m.reshape(-1).to(device, torch.float32), v.reshape(-1).to(device, torch.float32)
    (b1, b2), t = state.betas, state.step
    if kind == "precondition":
        if t < 1:
            raise ModelError("`precondition` needs Adam moments after at least one step; these are from step 0")
        return ParameterMap("precondition", base=(v / (1 - b2**t)).sqrt_().add_(state.eps).reciprocal_())
    if kind == "adam-less":
        return ParameterMap("adam-less", shift=b1 * m, base=b2 * v + state.eps, gain=1 - b1, gain2=1 - b2)
    c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    return ParameterMap(
        "adam", shift=m * (b1 / c1), base=v * (b2 / c2), gain=(1 - b1) / c1, gain2=(1 - b2) / c2, eps=state.eps
    )


def check_map(kind: str, state: AdamState | None) -> None:
    """Refuse an unknown map, or one that needs moments when there are none.

    Raises:
        RecipeError: either.
    """
    kinds = get_args(GradientMap)
    if kind not in kinds:
        raise RecipeError(f"unknown gradient map '{kind}'{did_you_mean(kind, list(kinds))}; known: {', '.join(kinds)}")
    if state is None and kind not in ("sgd", "sign"):
        raise RecipeError(f"gradient map '{kind}' needs a checkpoint with Adam moments; without one use sgd or sign")


def map_gradient(kind: str, state: AdamState | None, name: str, gradient: Tensor) -> Tensor:
    """Map one parameter's gradient: the readable form of what `features/influence.py` does in chunks.

    Returns:
        Γ, same shape, float32.
    """
    g = gradient.reshape(1, -1).float().clone()
    prepared = parameter_map(kind, state, name, gradient.shape)
    return prepared.apply_(g, torch.empty_like(g).view(-1), 0, g.shape[1]).view(gradient.shape)


def momentum_direction(prepared: ParameterMap) -> Tensor | None:
    """Γ at g = 0, (p,): the term all examples share, or None for a map without momentum."""
    if prepared.shift is None:
        return None
    zero = torch.zeros(1, prepared.shift.numel(), device=prepared.shift.device)
    return prepared.apply_(zero, torch.empty_like(zero).view(-1), 0, zero.shape[1])[0].nan_to_num_(nan=0.0)


def from_optimizer(optimizer: torch.optim.Optimizer, named_parameters: dict[str, Tensor]) -> AdamState:
    """Read a live torch Adam / AdamW optimiser's moments by parameter name.

    The optimiser has taken at least one step; parameters without state are left out.

    Raises:
        ModelError: the optimiser holds no Adam moments, or its parameters took different numbers of steps or settings.
    """
    names = {id(p): name for name, p in named_parameters.items()}
    exp_avg, exp_avg_sq, steps, settings = {}, {}, set(), set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg" not in state or id(p) not in names:
                continue
            exp_avg[names[id(p)]] = state["exp_avg"].detach().float().cpu().contiguous().clone()
            exp_avg_sq[names[id(p)]] = state["exp_avg_sq"].detach().float().cpu().contiguous().clone()
            steps.add(int(state["step"]))
            settings.add((tuple(group["betas"]), group["eps"]))
    if not exp_avg or len(steps) != 1 or len(settings) != 1:
        raise ModelError("can't read Adam moments: no Adam state, or parameters with different steps, betas or eps")
    betas, eps = settings.pop()
    return AdamState(exp_avg, exp_avg_sq, steps.pop(), (float(betas[0]), float(betas[1])), float(eps))


def save_adam(state: AdamState, folder: str | Path) -> Path:
    """Write `adam.safetensors` (keys `exp_avg.<name>`, `exp_avg_sq.<name>`; step, betas and eps in its header)."""
    path = Path(folder) / layout.MOMENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"exp_avg.{n}": t.float().cpu().contiguous() for n, t in state.exp_avg.items()}
    tensors |= {f"exp_avg_sq.{n}": t.float().cpu().contiguous() for n, t in state.exp_avg_sq.items()}
    about = {"step": state.step, "betas": state.betas, "eps": state.eps}
    # one entry: safetensors writes several in an order that differs from process to process
    save_file(tensors, path, metadata={"adam": json.dumps(about)})
    return path


def load_adam(path: str | Path) -> AdamState:
    """Read the moments of a checkpoint folder (or of the file itself).

    Step, betas and eps stand in the file's header, or in `meta.json` beside it.

    Raises:
        ModelError: no such file, not safetensors, or without step, betas and eps.
    """
    path = Path(path)
    path = path / layout.MOMENTS if path.is_dir() or path.suffix != ".safetensors" else path
    if not path.is_file():
        raise ModelError(f"{path}: no Adam moments there; a warm-up of this version writes them at every checkpoint")
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            meta = json.loads(header["adam"]) if "adam" in header else header
            for key in file.keys():
                kind, _, name = key.partition(".")
                if kind in ("exp_avg", "exp_avg_sq"):
                    (first if kind == "exp_avg" else second)[name] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from None
    beside = path.parent / layout.META
    if isinstance(meta, dict) and "step" not in meta and beside.is_file():
        try:
            meta = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise ModelError(f"{beside}: damaged (not JSON)") from None
    if not isinstance(meta, dict) or not {"step", "betas", "eps"} <= set(meta):
        raise ModelError(f"{path}: step, betas and eps stand neither in its header nor in meta.json beside it")
    try:
        beta1, beta2 = json.loads(meta["betas"]) if isinstance(meta["betas"], str) else meta["betas"]
        state = AdamState(first, second, int(meta["step"]), (float(beta1), float(beta2)), float(meta["eps"]))
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ModelError(f"{path}: step, betas or eps are no numbers") from None
    if set(first) != set(second) or not first or state.step < 0 or not math.isfinite(state.eps):
        raise ModelError(f"{path}: first and second moments don't belong together")
    return state
