"""What every method must do alike: shape, finiteness, permutation, seed, duplicates tie, k = n."""

import ast
from pathlib import Path

import numpy as np
import pytest

import keepset.methods
from keepset.features.solvers import ekfac_solve, fisher_coefficients
from keepset.methods.bm25 import bm25
from keepset.methods.davir import davir, davir_ref, rho
from keepset.methods.dsir import dsir
from keepset.methods.el2n import el2n, grand
from keepset.methods.forgetting import forgetting
from keepset.methods.gist import gist
from keepset.methods.ifd import ifd
from keepset.methods.instructdiff import instructdiff
from keepset.methods.knn_shapley import knn_shapley
from keepset.methods.length import length
from keepset.methods.less import tracin
from keepset.methods.loss import loss
from keepset.methods.metagradient import metagradient
from keepset.methods.perplexity import perplexity
from keepset.methods.random_ import random_
from keepset.methods.rds import rds
from keepset.methods.rose import rose
from keepset.methods.table import METHODS
from keepset.methods.tmc_shapley import tmc_shapley
from keepset.selection.select import select
from oracles import corrected_eigenvalues, datainf, in_run_shapley, influence, kronecker_bases

N = 40
WORDS = "sum apple river add three seven paint minus equals cloud dog cat run code loop".split()


def pool(seed: int = 0) -> dict:
    """Return per-row arrays with the row as first axis (row 1 repeats row 0), and what is not per row."""
    rng = np.random.default_rng(seed)
    rows = {
        "ids": np.array([f"{i:032x}" for i in rng.permutation(N)], dtype=object),
        "text": np.array([" ".join(rng.choice(WORDS, rng.integers(3, 30))) for _ in range(N)], dtype=object),
        "n_tokens": rng.integers(3, 90, N),
        "ini": rng.gamma(3, 20, N),
        "ref": rng.gamma(3, 15, N),
        "dots": rng.normal(size=(N, 3, 2)),
        "norms": rng.gamma(3, 1, (N, 3)),
        "losses": rng.gamma(3, 1, (N, 5)),
        "vectors": rng.normal(size=(N, 6)),
        "layers": rng.normal(size=(N, 2, 4)),
    }
    for name, values in rows.items():
        if name != "ids":
            values[1] = values[0]
    rows["ids"][1] = rows["ids"][0] + "-1"
    return rows


QUERIES = ["add three and seven", "sum minus three", "cat dog"]
TASKS = ["sums", "sums", "pets"]
LR = np.array([2e-5, 1e-5, 5e-6])
GRAM = np.stack([x @ x.T for x in np.random.default_rng(7).normal(size=(3, 3, 9))])
VECTORS = np.random.default_rng(9).normal(size=(3, 6))
LAYERS = np.random.default_rng(8).normal(size=(3, 2, 4))


def swap(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 0, 1)  # (n, c, ...) -> (c, n, ...)


def fisher(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Influence by the rows' own Fisher matrix, through their Gram matrix."""
    c = fisher_coefficients(rows @ rows.T, rows @ targets.T, damping=0.1)
    return influence(rows @ (targets - c.T @ rows).T / 0.1)[0]


def ekfac(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """EK-FAC of one matrix (2, 4), its factors from the rows' gradients."""
    q_a, q_b = kronecker_bases(rows.reshape(-1, 4), np.moveaxis(rows, 1, 2).reshape(-1, 2))
    solved = ekfac_solve(targets, q_a, q_b, corrected_eigenvalues(rows, q_a, q_b))
    return influence(np.einsum("nab,jab->nj", rows, solved))[0]


CASES = {
    "random": lambda r: random_(r["ids"], 3),
    "length": lambda r: length(r["n_tokens"]),
    "davir": lambda r: davir(r["ini"], r["ref"]),
    "davir-ref": lambda r: davir_ref(r["ini"], r["ref"]),
    "rho-sum": lambda r: rho(r["ini"], r["ref"]),
    "rho-mean": lambda r: rho(r["ini"], r["ref"], r["n_tokens"], form="mean"),
    "instructdiff": lambda r: instructdiff(r["ini"] - r["ref"], r["losses"][:, 0]),
    "ifd": lambda r: ifd(r["ini"], r["ref"], r["n_tokens"]),
    "perplexity low": lambda r: perplexity(r["ini"], r["n_tokens"], prefer="low"),
    "perplexity mid": lambda r: perplexity(r["ini"], r["n_tokens"], prefer="mid"),
    "perplexity high": lambda r: perplexity(r["ini"], r["n_tokens"], prefer="high"),
    "loss mean": lambda r: loss(r["ini"], r["n_tokens"]),
    "loss-ref sum, low": lambda r: loss(r["ini"], r["n_tokens"], form="sum", prefer="low"),
    "el2n": lambda r: el2n(r["ini"], r["n_tokens"]),
    "grad-norm": lambda r: grand(r["norms"].T),
    "forgetting": lambda r: forgetting(r["losses"].T),
    "rose": lambda r: rose(swap(r["dots"]), r["norms"].T, LR)[0],
    "less": lambda r: rose(swap(r["dots"]), r["norms"].T, LR, reduce="mean")[0],
    "grad-cosine": lambda r: rose(swap(r["dots"]), r["norms"].T)[0],
    "tracin": lambda r: tracin(swap(r["dots"]), LR)[0],
    "gist": lambda r: gist(swap(r["dots"])[:, :, [0, 1, 0]] + 1, GRAM, np.array([0, 0, 1]), LR)[0],
    "influence": lambda r: influence(r["dots"][:, 0])[0],
    "influence fisher": lambda r: fisher(r["vectors"], VECTORS),
    "ekfac": lambda r: ekfac(r["layers"], LAYERS),
    "tmc-shapley": lambda r: tmc_shapley(N, lambda some: float(r["ini"][some].sum()), permutations=4).values,
    "datainf": lambda r: datainf(list(swap(r["layers"])), list(swap(LAYERS))).mean(axis=1),
    "bm25": lambda r: bm25(list(r["text"]), QUERIES, TASKS)[0],
    "dsir": lambda r: dsir(list(r["text"]), QUERIES)[0],
    "dsir tasks": lambda r: dsir(list(r["text"]), QUERIES, TASKS, per_token=True, hash="fast")[0],
    "rds": lambda r: rds(r["vectors"], VECTORS, TASKS)[0],
    "rds+ query": lambda r: rds(r["vectors"], VECTORS, TASKS, per="query", reduce="mean")[0],
    "knn-shapley": lambda r: knn_shapley(r["vectors"], VECTORS, TASKS, k=3)[0],
    "metagradient": lambda r: metagradient(r["dots"][:, 0])[0],
    "metagradient max": lambda r: metagradient(r["dots"][:, 0], reduce="max")[0],
    "in-run-shapley": lambda r: in_run_shapley(swap(r["dots"]), LR, (r["norms"] > 2).T, swap(r["dots"]) ** 2)[0],
}
each = pytest.mark.parametrize("name", CASES)


@each
def test_one_finite_float_a_row(name):
    scores = CASES[name](pool())
    assert scores.shape == (N,) and scores.dtype == np.float64 and np.isfinite(scores).all()


@each
def test_permuting_the_pool_permutes_the_scores(name):
    rows, order = pool(), np.random.default_rng(1).permutation(N)
    shuffled = {key: values[order] for key, values in rows.items()}
    np.testing.assert_allclose(CASES[name](shuffled), CASES[name](rows)[order], rtol=1e-12, atol=1e-12)


@each
def test_the_same_again_and_inputs_untouched(name):
    rows = pool()
    first = CASES[name](rows)
    np.testing.assert_array_equal(first, CASES[name](rows))
    for key, values in pool().items():
        np.testing.assert_array_equal(values, rows[key])


@pytest.mark.parametrize("name", [name for name in CASES if name != "random"])
def test_duplicates_tie(name):
    scores = CASES[name](pool())
    assert scores[0] == pytest.approx(scores[1], rel=1e-12, abs=1e-12)
    assert len(np.unique(scores.round(12))) > 3  # and not because all rows tie


@each
def test_scores_follow_the_data(name):
    assert not np.array_equal(CASES[name](pool(0)), CASES[name](pool(1)))


@each
def test_choosing_all_rows_returns_each_once(name):
    rows = pool()
    chosen = select(CASES[name](rows), rows["ids"], ("rows", N))
    assert sorted(chosen) == list(range(N))


def test_every_method_has_a_case():
    assert {name.split()[0] for name in CASES} == set(METHODS)


def test_seeds_draw_differently_and_copies_of_a_row_are_separate_draws():
    rows = pool()
    a, b = random_(rows["ids"], 0), random_(rows["ids"], 1)
    assert not np.array_equal(a, b) and a[0] != a[1] and (a > 0).all() and (a < 1).all()
    noisy = [dsir(list(rows["text"]), QUERIES, ids=rows["ids"], seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])


def test_no_method_touches_torch_or_files():
    folder = Path(keepset.methods.__file__).parent
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
        }
        assert not names & {"torch", "transformers", "datasets", "os", "pathlib"}, path.name
        assert "open(" not in path.read_text(encoding="utf-8"), path.name


def test_every_method_states_its_source():
    folder = Path(keepset.methods.__file__).parent
    shared = {"__init__.py", "table.py", "gradient.py", "method.py", "tasks.py", "random_.py"}
    for path in folder.glob("*.py"):
        if path.name not in shared:
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert "arXiv" in doc or "Robertson" in doc, path.name
