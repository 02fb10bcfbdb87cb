"""What the gradient methods, influence functions and Shapley values of runs take: the second half of `scoring.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keepset.errors import RecipeError
from keepset.methods.el2n import grand
from keepset.methods.influence import influence as influence_scores
from keepset.methods.less import less, tracin
from keepset.methods.rose import rose
from keepset.methods.tasks import reduce_tasks
from keepset.runfolder.scored import Scored, task_parts

if TYPE_CHECKING:
    from keepset.stages.job import Job

AdamMap = Literal["adam", "adam-less", "precondition", "sgd", "sign"]


def with_defaults(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A method's options, those not given by their defaults."""
    from keepset.methods.table import options_of

    return {**{k: default for k, (_, default) in options_of(name).items()}, **options}


def influence_request(name: str, options: dict[str, Any]) -> Any:
    """The target gradient that a gradient method asks for, from its options and their defaults."""
    from keepset.stages.influence import Curvature, InfluenceRequest

    value = with_defaults(name, options)
    return InfluenceRequest(
        loss=value.get("loss", "sft"),
        map=value.get("map", "sgd"),
        reference=value.get("reference", "none"),
        beta=float(value.get("beta", 0.1)),
        normalise=value.get("normalise", "task"),
        curvature=Curvature(
            solver=solver_of(name, value),
            labels=value["labels"],
            damping=float(value["damping"]),
            rows=int(value["curvature_rows"]),
            seed=int(value["seed"]),
        )
        if name in SOLVERS
        else None,
    )


def solver_of(name: str, value: dict[str, Any]) -> str:
    """Which solver of `features/curvature.py` an influence function's options mean."""
    if value.get("curvature") == "gauss-newton":
        return "cg"
    return "ekfac-matrix" if value.get("damping_by") == "matrix" else SOLVERS[name]


def gradient_score(
    job: Job, name: str, options: dict[str, Any], reduce: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> Scored:
    """Fetch dots and norms for a gradient method, sharing the pass with the recipe's others, and reduce them."""
    from keepset.methods.table import METHODS
    from keepset.stages.influence import influence

    others = [
        influence_request(m.name, m.options)
        for m in job.recipe.methods
        if "gradients" in METHODS[m.name].needs and m.shots == job.shots
    ]
    found = influence(job, influence_request(name, options), others)
    if options.get("last"):
        found = {k: v[-options["last"] :] for k, v in found.items()}
    if not found["lr"].any():  # a decay to 0 in a single step: LESS's rate, logged after the step, is 0
        job.say("the warm-up took too few steps for a mean learning rate: its checkpoints count alike")
        found["lr"] = np.ones(len(found["lr"]))
    score, per_task = reduce(found)
    parts = task_parts(job.task_codes()[0], per_task)
    for c, lr in enumerate(found["lr"]):
        parts[f"ckpt{c}.norm"] = found["norms"][c]
        parts[f"ckpt{c}.momentum"] = found["momentum"][c]
        parts[f"ckpt{c}.cosine"] = (found["dots"][c] / found["norms"][c][:, None]).max(axis=1)
        parts[f"ckpt{c}.lr"] = np.full(len(score), lr)
        parts |= {
            f"ckpt{c}.{k}": np.full(len(score), found[k][c]) for k in ("store_rms", "store_spearman") if k in found
        }
    return Scored(score, parts)


def score_rose(
    job: Job,
    *,
    loss: Literal["dpo", "margin", "mean_margin"] = "dpo",
    map: AdamMap = "adam",
    reference: Literal["base", "checkpoint", "none"] = "base",
    beta: float = 0.1,
    normalise: Literal["pair", "task"] = "pair",
    cosine: bool = True,
    reduce: Literal["max", "mean"] = "max",
    last: int = 0,
) -> Scored:
    """Influence on the DPO loss of the target's pairs; `last`: only the last so many checkpoints (0: all)."""
    if not job.target.has_pairs:
        raise RecipeError("rose needs pairs: the target has no `rejected`; use less, or give chosen and rejected")
    options = dict(loss=loss, map=map, reference=reference, beta=beta, normalise=normalise, last=last)
    return gradient_score(
        job, "rose", options, lambda f: rose(f["dots"], f["norms"], f["lr"], cosine=cosine, reduce=reduce)
    )


def score_less(
    job: Job,
    *,
    map: AdamMap = "adam",
    normalise: Literal["pair", "task"] = "pair",
    cosine: bool = True,
    reduce: Literal["max", "mean"] = "max",
    last: int = 0,
) -> Scored:
    """Influence on the SFT loss of the target's (chosen) rows; `last`: only the last so many checkpoints (0: all)."""
    options = dict(map=map, normalise=normalise, last=last)
    return gradient_score(
        job, "less", options, lambda f: less(f["dots"], f["norms"], f["lr"], cosine=cosine, reduce=reduce)
    )


def score_tracin(job: Job, *, reduce: Literal["max", "mean"] = "mean") -> Scored:
    """Plain inner products, learning-rate-weighted over checkpoints."""
    return gradient_score(job, "tracin", {}, lambda f: tracin(f["dots"], f["lr"], reduce=reduce))


def score_grad_cosine(job: Job, *, reduce: Literal["max", "mean"] = "max") -> Scored:
    """Cosine of plain gradients."""
    return gradient_score(job, "grad-cosine", {}, lambda f: less(f["dots"], f["norms"], f["lr"], reduce=reduce))


def score_grad_norm(job: Job) -> Scored:
    """Norm of the plain gradient of the row's mean token loss, mean over the warm-up's checkpoints."""
    return gradient_score(job, "grad-norm", {}, lambda f: (grand(f["norms"]), np.zeros((f["norms"].shape[1], 0))))


SOLVERS = {"influence": "fisher", "datainf": "datainf", "ekfac": "ekfac"}
Labels = Literal["sampled", "data"]


def curvature_score(job: Job, name: str, reduce: Literal["max", "mean"], **options: Any) -> Scored:
    """An influence function: TracIn's pass over the pool, with the target multiplied by an inverse curvature."""
    return gradient_score(job, name, options, lambda f: influence_scores(f["dots"][0], reduce=reduce))


def score_influence(
    job: Job,
    *,
    curvature: Literal["fisher", "gauss-newton"] = "fisher",
    curvature_rows: int = 100,
    labels: Labels = "sampled",
    damping: float = 0.1,
    reduce: Literal["max", "mean"] = "mean",
    seed: int = 0,
) -> Scored:
    """Influence function: some rows' damped Fisher matrix inverted exactly, or Gauss-Newton by conjugate gradients."""
    return curvature_score(
        job, "influence", reduce, curvature=curvature, curvature_rows=curvature_rows, labels=labels, damping=damping,
        seed=seed,
    )  # fmt: skip


def score_datainf(
    job: Job,
    *,
    curvature_rows: int = 200,
    labels: Labels = "data",
    damping: float = 0.1,
    reduce: Literal["max", "mean"] = "mean",
    seed: int = 0,
) -> Scored:
    """DataInf's closed form, each LoRA matrix by itself."""
    return curvature_score(
        job, "datainf", reduce, curvature_rows=curvature_rows, labels=labels, damping=damping, seed=seed
    )


def score_ekfac(
    job: Job,
    *,
    curvature_rows: int = 200,
    labels: Labels = "sampled",
    damping: float = 0.1,
    damping_by: Literal["all", "matrix"] = "all",
    reduce: Literal["max", "mean"] = "mean",
    seed: int = 0,
) -> Scored:
    """Eigenvalue-corrected Kronecker factors of each LoRA matrix; one damping for all of them, or one for each."""
    return curvature_score(
        job, "ekfac", reduce, curvature_rows=curvature_rows, labels=labels, damping=damping, damping_by=damping_by,
        seed=seed,
    )  # fmt: skip


# -- Shapley values of training runs ---------------------------------------------------------------------------------


def in_run_request(options: dict[str, Any]) -> Any:
    """The run that in-run-shapley asks for, from its options and their defaults."""
    from keepset.stages.shapley import InRun

    value = with_defaults("in-run-shapley", options)
    return InRun(
        second_order=value["order"] == "second", learning_rate=float(value["learning_rate"]),
        batch_size=int(value["batch_size"]), epochs=int(value["epochs"]), seed=int(value["seed"]),
    )  # fmt: skip


def score_in_run_shapley(
    job: Job,
    *,
    order: Literal["first", "second"] = "first",
    learning_rate: float = 0.05,
    batch_size: int = 32,
    epochs: int = 1,
    reduce: Literal["max", "mean"] = "mean",
    seed: int = 0,
) -> Scored:
    """Each row's share of the target's loss drop in one SGD run over the pool, from the warm-up's last checkpoint."""
    from keepset.stages.shapley import in_run_values

    options = dict(order=order, learning_rate=learning_rate, batch_size=batch_size, epochs=epochs, seed=seed)
    per_task = in_run_values(job, in_run_request(options))
    return Scored(reduce_tasks(per_task, reduce), task_parts(job.task_codes()[0], per_task))


def retraining_request(options: dict[str, Any]) -> Any:
    """Players and orders that tmc-shapley asks for, from its options and their defaults."""
    from keepset.stages.shapley import Retrain

    value = with_defaults("tmc-shapley", options)
    return Retrain(
        value["players"], int(value["rows_per_player"]), int(value["permutations"]), float(value["tolerance"]),
        int(value["seed"]),
    )  # fmt: skip


def score_tmc_shapley(
    job: Job,
    *,
    players: Literal["row", "source", "category"] = "row",
    permutations: int = 20,
    rows_per_player: int = 16,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Scored:
    """Truncated Monte-Carlo Shapley of real trainings; few players: rows of a tiny pool, or whole sources."""
    from keepset.stages.shapley import retraining_values

    options = dict(
        players=players, permutations=permutations, rows_per_player=rows_per_player, tolerance=tolerance, seed=seed
    )
    value, error, _ = retraining_values(job, retraining_request(options))
    return Scored(value, {"standard_error": error})
