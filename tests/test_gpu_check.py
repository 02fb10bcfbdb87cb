"""What a GPU would run, on the CPU with tiny models: `make gpu-check` from end to end, and the passes by its route."""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.features import gradients  # noqa: E402
from keepset.features.influence import influence  # noqa: E402
from keepset.features.losses import row_losses  # noqa: E402
from keepset.features.representations import representations  # noqa: E402
from keepset.model import attention, passes  # noqa: E402
from keepset.model.passes import Shortcuts  # noqa: E402
from slow_gradients import random_state, shapes_of, some_target  # noqa: E402
from tolerance import FORWARD, MAPPED  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_it_runs_from_end_to_end_and_records_nothing_of_a_cpu(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    recorded = ROOT / "benchmarks/results/gpu.json"
    before = recorded.read_bytes() if recorded.exists() else None
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    checked = {(row["dtype"], row["what"]) for row in result["compare"]}
    assert checked == {(dtype, what) for dtype in ("float32", "bfloat16") for what in gpu.PASSES}
    assert all(0 < row["error"] <= row["tolerance"] for row in result["compare"])
    assert {what: t["keepset"] > 0 < t["floor"] for what, t in result["throughput"]["float32"].items()} == {
        "losses": True, "gradients": True,
    }  # fmt: skip
    assert result["waits"]["counted"] is False and "CUDA" in result["waits"]["why"]
    assert result["context"]["device"].startswith("cpu") and "within tolerance" in capsys.readouterr().out
    assert (recorded.read_bytes() if recorded.exists() else None) == before


@pytest.mark.parametrize("what", ["row_losses", "representations", "influence"])
def test_a_wrong_number_ends_it_with_1(what: str, gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = getattr(gpu, what)

    def wrong(*args: Any, **options: Any) -> Any:
        got = right(*args, **options)
        if what == "representations":
            return got * (1 + 1e-3)
        changed = "nll" if what == "row_losses" else "dots"
        return replace(got, **{changed: getattr(got, changed) * (1 + 1e-3)})

    monkeypatch.setattr(gpu, what, wrong)
    monkeypatch.setattr(gpu, "DTYPES", ("float32",))
    assert gpu.main(["--device", "cpu", "--quick", "--parts", "compare"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 1 and "1 comparisons are out of tolerance" in printed
    assert "written" not in printed


def test_without_a_gpu_it_says_what_to_do(gpu: Any, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "install its CUDA build, or try with --device cpu" in capsys.readouterr().err


def test_what_makes_the_host_wait_is_counted_by_file_and_line(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's warnings, as a GPU would give them; other warnings are none of them."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run(rows: Any, budget: int) -> None:
        for _ in range(budget):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu.waiting(run, [], 3).total() == 3 and modes == ["warn", "default"]
    assert next(iter(gpu.waiting(run, [], 3))).startswith("test_gpu_check.py:")


READS = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "repeat_interleave.Tensor", "unique")


class Reads(TorchDispatchMode):
    """Operations after which the host would wait for a GPU: those that read numbers back, and masks as indices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = name.startswith("aten.index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for part in args
            if isinstance(part, list)
            for x in part
        )
        if masks or any(read in name for read in READS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_route_of_a_gpu_gives_the_same_numbers_and_reads_nothing_back_in_a_batch(
    architecture: str, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    model, rows = tiny_lora(tiny_model(architecture)), random_rows(24, seed=5, shortest=8, longest=8)
    target = some_target(model)
    state, budget = random_state(shapes_of(target)), 4 * 8 + 3
    calls = {
        "losses": lambda some: (
            row_losses(model, some, token_budget=budget, adapters=(False, True), shortcuts=shortcuts).nll
        ),
        "last": lambda some: representations(model, some, token_budget=budget, pooling="last"),
        "mean": lambda some: representations(model, some, token_budget=budget),
        "gradients": lambda some: influence(model, some, target, adam=state, token_budget=budget).dots,
    }
    shortcuts = Shortcuts()
    here = {what: call(rows) for what, call in calls.items()}
    shortcuts = Shortcuts(prefix=False)
    monkeypatch.setattr(passes, "serves", lambda *_: False)
    monkeypatch.setattr(gradients, "serves", lambda *_: False)
    monkeypatch.setattr(attention, "packed_attention", lambda q, k, v, segments, *, scale=None, window=None:
                        attention._packed_elsewhere(q, k, v, segments, scale, window))  # fmt: skip
    for what, call in calls.items():
        there, size = call(rows), np.abs(here[what]).max()
        assert np.abs(there - here[what]).max() <= (MAPPED if what == "gradients" else 2 * FORWARD) * size, what
        counts = []
        for n in (8, 24):  # two and six batches
            with Reads() as reads:
                call(rows[:n])
            counts.append(sorted(reads.names))
        assert counts[0] == counts[1], what
