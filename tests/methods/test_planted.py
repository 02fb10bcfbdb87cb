"""Planted truth: a tenth of the rows shares the target's direction; each target-aware method must bring it up."""

import numpy as np
import pytest

from keepset.features.solvers import ekfac_solve, fisher_coefficients
from keepset.methods.knn_shapley import knn_shapley
from keepset.methods.less import tracin
from keepset.methods.metagradient import metagradient
from keepset.methods.random_ import random_
from keepset.methods.rds import rds
from keepset.methods.rose import rose
from keepset.methods.tmc_shapley import tmc_shapley
from oracles import corrected_eigenvalues, datainf, dense_solve, in_run_shapley, influence, kronecker_bases

N, D = 400, 64
RNG = np.random.default_rng(0)
TRUTH = np.arange(N) % 10 == 0
TOPIC = RNG.normal(size=D) / np.sqrt(D)
ROWS = RNG.normal(size=(N, D)) / np.sqrt(D) + TRUTH[:, None] * TOPIC
QUERIES = RNG.normal(size=(8, D)) / np.sqrt(D) + TOPIC
TASKS = ["a"] * 5 + ["b"] * 3
TARGET = QUERIES.mean(axis=0)[None]
DOTS, NORMS = (ROWS @ TARGET.T)[None], np.linalg.norm(ROWS, axis=1)[None]


def fisher() -> np.ndarray:
    c = fisher_coefficients(ROWS @ ROWS.T, ROWS @ TARGET.T, damping=0.1)
    return influence(ROWS @ (TARGET - c.T @ ROWS).T)[0]


def ekfac() -> np.ndarray:
    rows, target = ROWS.reshape(N, 8, 8), TARGET.reshape(1, 8, 8)
    q_a, q_b = kronecker_bases(rows.reshape(-1, 8), np.moveaxis(rows, 1, 2).reshape(-1, 8))
    solved = ekfac_solve(target, q_a, q_b, corrected_eigenvalues(rows, q_a, q_b), damping=0.1)
    return (rows * solved[0]).sum(axis=(1, 2))


def mean_likeness(some: np.ndarray) -> float:
    """A utility of sets: how near the mean row is to the target."""
    return float(ROWS[some].mean(axis=0) @ TARGET[0]) if len(some) else 0.0


METHODS = {
    "rds": lambda: rds(ROWS, QUERIES, TASKS)[0],
    "knn-shapley": lambda: knn_shapley(ROWS, QUERIES, TASKS)[0],
    "rose": lambda: rose(DOTS, NORMS)[0],
    "tracin": lambda: tracin(DOTS)[0],
    "datainf": lambda: datainf([ROWS], [TARGET])[:, 0],
    "influence": lambda: influence(ROWS @ dense_solve(ROWS.T @ ROWS / N, TARGET, damping=0.1).T)[0],
    "influence-fisher": fisher,
    "ekfac": ekfac,
    "tmc-shapley": lambda: tmc_shapley(N, mean_likeness, permutations=40).values,
    "metagradient": lambda: metagradient(-DOTS[0])[0],  # one step of plain SGD: u is the target's gradient
    "in-run-shapley": lambda: in_run_shapley(DOTS, np.ones(1), np.ones((1, N), bool))[0],
}


def recall(scores: np.ndarray) -> float:
    return float(TRUTH[np.argsort(-scores)[: N // 10]].mean())


@pytest.mark.parametrize("name", METHODS)
def test_the_planted_tenth_is_found(name):
    assert recall(METHODS[name]()) >= 0.9


def test_random_finds_its_tenth():
    assert np.mean([recall(random_(N, seed)) for seed in range(40)]) == pytest.approx(0.1, abs=0.02)
