"""Which features each method takes: one short function a method, and one literal table of them all.

A function takes the job and the method's options and returns `Scored`. It fetches arrays (from `stages`, or texts),
calls the paper's function in `methods/`, and names the parts worth keeping beside the score. Those that take gradients
or training runs stand in `scoring_gradients.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import numpy as np
import pyarrow as pa

from keepset.errors import RecipeError, did_you_mean
from keepset.methods.bm25 import bm25
from keepset.methods.davir import davir, davir_ref, rho
from keepset.methods.dsir import dsir
from keepset.methods.el2n import el2n
from keepset.methods.forgetting import forgetting
from keepset.methods.gradient import (
    score_datainf,
    score_ekfac,
    score_grad_cosine,
    score_grad_norm,
    score_in_run_shapley,
    score_influence,
    score_less,
    score_rose,
    score_tmc_shapley,
    score_tracin,
)
from keepset.methods.ifd import ifd
from keepset.methods.knn_shapley import knn_shapley
from keepset.methods.length import length
from keepset.methods.loss import loss
from keepset.methods.perplexity import perplexity
from keepset.methods.random_ import random_
from keepset.methods.rds import rds
from keepset.pipeline.idle import refuse_idle_options
from keepset.recipe import MethodSpec
from keepset.runfolder import layout
from keepset.runfolder.scored import Scored, signed, task_parts

if TYPE_CHECKING:
    from keepset.stages.job import Job

Pooling = Literal["last", "weighted_mean"]
TokenLoss = Literal["ce", "label-smoothed", "focal"]
Cost = Literal["free", "text", "forward", "reference", "gradients", "retraining"]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    score: Callable[..., Scored]
    paper: str
    formula: str
    needs: tuple[str, ...]
    """Of: text, target, pairs; losses, error-norms, answers, reference, checkpoint-losses, representations; warmup,
    gradients, curvature, in-run, retraining. `counts.py` knows what each costs."""
    #   gradients, representations, target, pairs
    cost: Cost


# -- no model ---------------------------------------------------------------------------------------------------


def score_random(job: Job, *, seed: int = 0) -> Scored:
    """Uniform numbers by content id."""
    return Scored(random_(job.ids, seed))


def score_length(job: Job, *, prefer: Literal["long", "short"] = "long") -> Scored:
    """Tokens of the completion (words in the torch-free core)."""
    return Scored(length(job.n_tokens(), prefer=prefer))


def score_bm25(
    job: Job,
    *,
    query: Literal["prompt", "prompt+chosen"] = "prompt",
    k1: float = 1.5,
    b: float = 0.75,
    reduce: Literal["max", "mean"] = "max",
) -> Scored:
    """Lexical similarity to the target's prompts."""
    names, codes = job.task_codes()
    texts = job.target_texts(with_chosen=query == "prompt+chosen")
    score, per_task = bm25(job.texts(), texts, codes, k1=k1, b=b, reduce=reduce)
    return Scored(score, task_parts(names, per_task))


def score_dsir(
    job: Job,
    *,
    query: Literal["prompt", "prompt+chosen"] = "prompt+chosen",
    gumbel: bool = True,
    seed: int = 0,
    per_token: bool = False,
    by_task: bool = False,
    reduce: Literal["max", "mean"] = "max",
) -> Scored:
    """Importance weight of the row's n-grams, target against pool."""
    names, codes = job.task_codes()
    texts = job.target_texts(with_chosen=query == "prompt+chosen")
    score, per_task = dsir(
        job.texts(), texts, codes if by_task else None, ids=job.ids, gumbel=gumbel, seed=seed, per_token=per_token,
        reduce=reduce,
    )  # fmt: skip
    return Scored(score, task_parts(names if by_task else ["all"], per_task))


# -- forward passes -----------------------------------------------------------------------------------------------


def score_rds(
    job: Job,
    *,
    pooling: Pooling = "last",
    reduce: Literal["max", "mean"] = "max",
    per: Literal["task", "query"] = "task",
    embedding_model: str = "",
) -> Scored:
    """Cosine of pooled hidden states, or of an embedding model's vectors, with the target's prompt + chosen rows."""
    from keepset.stages.losses import embeddings, representations

    names, codes = job.task_codes()
    if embedding_model:
        states, queries = embeddings(job, embedding_model)
    else:
        states, queries = representations(job, pooling)
        codes = codes[job.target_pairs[1]]
    score, per_column = rds(states, queries, codes, reduce=reduce, per=per)
    if per == "query":
        names = [f"{names[code]}.{k}" for k, code in enumerate(codes)]
    return Scored(score, task_parts(names, per_column))


def score_rds_plus(
    job: Job, *, reduce: Literal["max", "mean"] = "max", per: Literal["task", "query"] = "task"
) -> Scored:
    """RDS with the position-weighted mean of all tokens."""
    return score_rds(job, pooling="weighted_mean", reduce=reduce, per=per)


def score_knn_shapley(
    job: Job, *, k: int = 5, pooling: Pooling = "weighted_mean", reduce: Literal["max", "mean"] = "mean"
) -> Scored:
    """Exact Shapley value in the nearest-neighbour game on cosine similarity."""
    from keepset.stages.losses import representations

    names, codes = job.task_codes()
    states, queries = representations(job, pooling)
    score, per_task = knn_shapley(states, queries, codes[job.target_pairs[1]], k=k, reduce=reduce)
    return Scored(score, task_parts(names, per_task))


def score_perplexity(job: Job, *, prefer: Literal["low", "mid", "high"] = "mid") -> Scored:
    """Low, middle or high mean NLL under the base."""
    from keepset.stages.losses import base_losses

    found = base_losses(job)
    return Scored(perplexity(found["nll"], found["n_tokens"], prefer=prefer), {"loss_ini": found["nll"]})


def score_loss(
    job: Job,
    *,
    prefer: Literal["high", "low"] = "high",
    form: Literal["mean", "sum"] = "mean",
    token_loss: TokenLoss = "ce",
) -> Scored:
    """The base's loss alone."""
    from keepset.stages.losses import base_losses

    found = base_losses(job, token_loss=token_loss)
    return Scored(loss(found["nll"], found["n_tokens"], form=form, prefer=prefer), {"loss_ini": found["nll"]})


def score_loss_ref(
    job: Job,
    *,
    prefer: Literal["high", "low"] = "high",
    form: Literal["mean", "sum"] = "mean",
    token_loss: TokenLoss = "ce",
) -> Scored:
    """The reference's loss alone."""
    ini, ref, n_tokens = loss_pair(job, token_loss)
    return Scored(loss(ref, n_tokens, form=form, prefer=prefer), {"loss_ini": ini, "loss_ref": ref})


def score_ifd(job: Job, *, ceiling: float = 1.0) -> Scored:
    """How little the prompt helps the answer."""
    from keepset.stages.losses import answer_losses, base_losses

    given, alone = base_losses(job), answer_losses(job)
    score = ifd(given["nll"], alone["nll"], given["n_tokens"], alone["n_tokens"], ceiling=ceiling)
    return Scored(score, {"loss_ini": given["nll"], "loss_alone": alone["nll"]})


def score_el2n(job: Job) -> Scored:
    """Mean over the row's supervised tokens of ‖softmax − onehot‖, under the base."""
    from keepset.stages.losses import base_losses

    found = base_losses(job, token_loss="error-norm")
    return Scored(el2n(found["nll"], found["n_tokens"]))


def score_forgetting(job: Job) -> Scored:
    """Forgetting events over the base and the warm-up's checkpoints."""
    from keepset.stages.losses import checkpoint_losses

    return Scored(forgetting(checkpoint_losses(job)))


# -- base and reference ---------------------------------------------------------------------------------------------


def loss_pair(
    job: Job, token_loss: TokenLoss = "ce", end_of_turn: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed losses (n,) under base and reference, in nats, and the tokens (n,) they are summed over."""
    from keepset.stages.losses import reference_losses

    base, reference = reference_losses(job, token_loss=token_loss, end_of_turn=end_of_turn)
    return base["nll"], reference["nll"], base["n_tokens"]


def score_davir(
    job: Job,
    *,
    prefer: Literal["high", "low"] = "high",
    token_loss: TokenLoss = "ce",
    side: Literal["chosen", "rejected", "margin"] = "chosen",
    end_of_turn: bool = True,
) -> Scored:
    """Share of the loss that fine-tuning on the pool removed; of a pair: of one side, or chosen less rejected."""
    from keepset.stages.losses import rejected_losses

    if side != "chosen" and not end_of_turn:
        raise RecipeError("davir: `end_of_turn: false` is for `side: chosen`")
    ini, ref, _ = loss_pair(job, token_loss, end_of_turn)
    parts = {"loss_ini": ini, "loss_ref": ref}
    score = davir(ini, ref)
    if side != "chosen":
        base, reference = rejected_losses(job, token_loss=token_loss)
        parts |= {"loss_ini.rejected": base["nll"], "loss_ref.rejected": reference["nll"]}
        parts |= {"chosen": score, "rejected": davir(base["nll"], reference["nll"])}
        score = parts["rejected"] if side == "rejected" else parts["chosen"] - parts["rejected"]
    return Scored(signed(score, prefer), parts)


def score_davir_ref(
    job: Job, *, prefer: Literal["high", "low"] = "high", token_loss: TokenLoss = "ce", end_of_turn: bool = True
) -> Scored:
    """DavIR over the reference's loss: the same ranking."""
    ini, ref, _ = loss_pair(job, token_loss, end_of_turn)
    return Scored(signed(davir_ref(ini, ref), prefer), {"loss_ini": ini, "loss_ref": ref})


def score_rho_sum(
    job: Job, *, prefer: Literal["high", "low"] = "high", token_loss: TokenLoss = "ce", end_of_turn: bool = True
) -> Scored:
    """Plain loss drop, summed over tokens."""
    ini, ref, _ = loss_pair(job, token_loss, end_of_turn)
    return Scored(signed(rho(ini, ref), prefer), {"loss_ini": ini, "loss_ref": ref})


def score_rho_mean(
    job: Job, *, prefer: Literal["high", "low"] = "high", token_loss: TokenLoss = "ce", end_of_turn: bool = True
) -> Scored:
    """Plain loss drop, mean over tokens."""
    ini, ref, n_tokens = loss_pair(job, token_loss, end_of_turn)
    return Scored(signed(rho(ini, ref, n_tokens, form="mean"), prefer), {"loss_ini": ini, "loss_ref": ref})


# -- the table ------------------------------------------------------------------------------------------------------

DAVIR = "DavIR, arXiv 2310.13008"
METHODS: dict[str, Method] = {
    "random": Method(score_random, "–", "S = u(id, seed)", ("text",), "free"),
    "length": Method(score_length, "arXiv 2402.04833", "S = T", ("text",), "free"),
    "bm25": Method(score_bm25, "Robertson & Zaragoza 2009", "S = max_j mean_q BM25(q, z)", ("text", "target"), "text"),
    "rds": Method(
        score_rds, "arXiv 2402.04333", "S = max_j mean_q cos(h(z), h(q))", ("representations", "target"), "forward"
    ),
    "rds+": Method(
        score_rds_plus, "arXiv 2503.01807", "rds, position-weighted mean", ("representations", "target"), "forward"
    ),
    "dsir": Method(
        score_dsir, "DSIR, arXiv 2302.03169", "S = Σ_b c_b(z) log(p_b / q_b) + Gumbel", ("text", "target"), "text"
    ),
    "knn-shapley": Method(
        score_knn_shapley,
        "KNN-Shapley, arXiv 1908.08619",
        "S = mean_q φ_z(U_q), U_q = mean similarity of the K nearest",
        ("representations", "target"),
        "forward",
    ),
    "perplexity": Method(score_perplexity, "arXiv 2309.04564", "S = ±L_ini / T, or its middle", ("losses",), "forward"),
    "loss": Method(score_loss, DAVIR, "S = ±L_ini / T, or ±L_ini", ("losses",), "forward"),
    "loss-ref": Method(score_loss_ref, DAVIR, "S = ±L_ref / T, or ±L_ref", ("losses", "reference"), "reference"),
    "ifd": Method(
        score_ifd, "Cherry, arXiv 2308.12032", "S = L(y | x) / L(y), above 1 last", ("losses", "answers"), "forward"
    ),
    "el2n": Method(
        score_el2n, "EL2N, arXiv 2107.07075", "S = (1/T) Σ_t ‖p_t − onehot(y_t)‖", ("error-norms",), "forward"
    ),
    "forgetting": Method(
        score_forgetting,
        "arXiv 1812.05159",
        "S = times learnt and lost again",
        ("losses", "warmup", "checkpoint-losses"),
        "gradients",
    ),
    "grad-norm": Method(
        score_grad_norm, "GraNd, arXiv 2107.07075", "S = mean_c ‖∇ℓ(z)‖", ("gradients", "target"), "gradients"
    ),
    "davir": Method(score_davir, DAVIR, "S = (L_ini − L_ref) / L_ini", ("losses", "reference"), "reference"),
    "davir-ref": Method(score_davir_ref, DAVIR, "S = (L_ini − L_ref) / L_ref", ("losses", "reference"), "reference"),
    "rho-sum": Method(score_rho_sum, DAVIR, "S = L_ini − L_ref (summed)", ("losses", "reference"), "reference"),
    "rho-mean": Method(score_rho_mean, DAVIR, "S = (L_ini − L_ref) / T", ("losses", "reference"), "reference"),
    "rose": Method(
        score_rose,
        "ROSE, arXiv 2412.00631",
        "S = max_j Σ_c w_c cos(Γ_c(z), ∇ℓ_DPO,j)",
        ("gradients", "target", "pairs"),
        "gradients",
    ),
    "less": Method(
        score_less,
        "LESS, arXiv 2402.04333",
        "S = max_j Σ_c w_c cos(Γ_c(z), ∇ℓ_SFT,j)",
        ("gradients", "target"),
        "gradients",
    ),
    "tracin": Method(
        score_tracin,
        "TracIn, arXiv 2002.08484",
        "S = mean_j Σ_c η_c <∇ℓ(z), ∇ℓ_j>",
        ("gradients", "target"),
        "gradients",
    ),
    "grad-cosine": Method(
        score_grad_cosine, "–", "S = max_j Σ_c w_c cos(∇ℓ(z), ∇ℓ_j)", ("gradients", "target"), "gradients"
    ),
    "influence": Method(
        score_influence,
        "arXiv 1703.04730",
        "S = mean_j v_jᵀ (F + λI)⁻¹ ∇ℓ(z)",
        ("gradients", "curvature", "target"),
        "gradients",
    ),
    "datainf": Method(
        score_datainf,
        "DataInf, arXiv 2310.00902",
        "influence, mean of one-row inverses a matrix",
        ("gradients", "curvature", "target"),
        "gradients",
    ),
    "ekfac": Method(
        score_ekfac,
        "EK-FAC, arXiv 2308.03296",
        "influence, eigenvalue-corrected Kronecker factors",
        ("gradients", "curvature", "target"),
        "gradients",
    ),
    "in-run-shapley": Method(
        score_in_run_shapley,
        "In-Run Data Shapley, arXiv 2406.11011",
        "S = Σ_t η_t <v_t, g> [− η_t²/2 · gᵀ H_t Σ g]",
        ("in-run", "warmup", "target"),
        "gradients",
    ),
    "tmc-shapley": Method(
        score_tmc_shapley,
        "Data Shapley, arXiv 1904.02868",
        "S = E_π[U(before + z) − U(before)], U = −loss after training",
        ("retraining", "target"),
        "retraining",
    ),
}


def needs_model(name: str) -> bool:
    """Whether a method needs a tokenizer or a model."""
    return "text" not in method(name).needs


def method(name: str) -> Method:
    """Look a method up.

    Raises:
        RecipeError: there is none of that name, with the closest one.
    """
    if name not in METHODS:
        hint = did_you_mean(name, list(METHODS)) or f"; there are: {', '.join(METHODS)}"
        raise RecipeError(f"methods: no method '{name}'{hint}")
    return METHODS[name]


def options_of(name: str) -> dict[str, tuple[Any, Any]]:
    """A method's options: name -> (type, default)."""
    function = method(name).score
    types = get_type_hints(function, localns={"Job": object})
    return {k: (types[k], p.default) for k, p in inspect.signature(function).parameters.items() if k != "job"}


def check_options(spec: MethodSpec) -> None:
    """Check a method's options before anything runs.

    Raises:
        RecipeError: an unknown option, a value that isn't one of its choices, or an option that does nothing.
    """
    known = options_of(spec.name)
    for key, value in spec.options.items():
        if key not in known:
            hint = did_you_mean(key, list(known)) or f"; it has: {', '.join(known) or 'none'}"
            raise RecipeError(f"method {spec.name}: no option '{key}'{hint}")
        kind = known[key][0]
        if get_args(kind) and value not in get_args(kind):
            raise RecipeError(
                f"method {spec.name}: {key} is one of {', '.join(map(str, get_args(kind)))}, not '{value}'"
            )
        number = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
        if not get_args(kind) and not number and not isinstance(value, kind):
            raise RecipeError(f"method {spec.name}: {key} must be {kind.__name__}, not '{value}'")
    if spec.shots is not None and "target" not in METHODS[spec.name].needs:
        raise RecipeError(f"method {spec.label}: shots does nothing here: {spec.name} looks at no target; remove it")
    defaults = {key: default for key, (_, default) in known.items()}
    refuse_idle_options(spec, {**defaults, **spec.options}, defaults)


# -- scoring a job --------------------------------------------------------------------------------------------------


def score(job: Job, spec: MethodSpec) -> pa.Table:
    """Score every usable row by one method and write `scores/<label>.parquet`.

    Returns:
        id, source, category, score, rank (1 = best; null where unscored), selected (all false), n_tokens, reason (why a
        row has no score), the method's parts. Rows are in the pool's order.

    Raises:
        RecipeError: unknown method or option.
    """
    from keepset.pipeline.score_key import score_key

    check_options(spec)
    job.save_quarantine()
    with job.run.timed(f"score {spec.label}") as spent:
        found = METHODS[spec.name].score(job if spec.shots is None else job.with_shots(spec.shots), **spec.options)
        spent["rows"] = len(found.score)
    values = np.asarray(found.score, dtype=np.float64)
    finite = np.isfinite(values)
    rank = np.zeros(len(values), dtype=np.int64)
    rank[ranking(values, job.ids)] = np.arange(1, len(values) + 1)
    subset = job.pool.table.take(pa.array(job.usable))
    table = pa.table(
        {
            "id": pa.array(job.ids.astype(str)),
            "source": subset["source"],
            "category": subset["category"],
            "score": pa.array(np.where(finite, values, np.nan), mask=~finite),
            "rank": pa.array(rank, mask=~finite),
            "selected": pa.array(np.zeros(len(values), dtype=bool)),
            "n_tokens": pa.array(job.n_tokens()),
            "reason": pa.array(
                [None if ok else unscored(v) for ok, v in zip(finite, values, strict=True)], pa.string()
            ),
            **{name: pa.array(part) for name, part in found.parts.items()},
        }
    ).replace_schema_metadata(
        {"method": spec.name, "label": spec.label, "options": str(spec.options), "length_unit": job.length_unit}
    )
    job.run.save_table(layout.scores(spec.label), table, key=score_key(job, spec))
    bad = int((~finite).sum())
    job.say(f"{spec.label}: {len(values)} rows in = {len(values) - bad} scored + {bad} quarantined")
    return table


def ranking(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Indices best first; ties by id, NaN and infinite last."""
    keys = np.where(np.isfinite(scores), -scores, np.inf)
    return np.lexsort((ids.astype(str), keys))


def unscored(value: float) -> str:
    """Why a row has no score."""
    return "nan-score" if np.isnan(value) else "infinite-score"
