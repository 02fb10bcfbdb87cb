"""Every kind of file in a finished run folder, damaged in five ways: found each time, and only that part done again."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trl")

from rich.console import Console

from crash import outcome
from keepset.errors import KeepsetError
from keepset.pipeline import run_recipe
from keepset.pipeline.learn import Learner, evaluate_final
from keepset.pipeline.run import evaluated_cells
from keepset.recipe import load_recipe
from keepset.runfolder.run import Run
from keepset.stages.job import Job

# kind -> (the file, another of its kind to be swapped with, what may be computed again)
KINDS: dict[str, tuple[str, str, list[str]]] = {
    "shard": (
        "work/losses-base/*/00000.safetensors", "work/losses-base/*/00001.safetensors",
        ["work/losses-base/*/00000.safetensors"],
    ),
    "shard record": (
        "work/influence-*-checkpoint-4/*/00001.json", "work/influence-*-checkpoint-4/*/00000.json",
        ["work/influence-*-checkpoint-4/*/00001.safetensors"],
    ),
    "scores": ("scores/davir.parquet", "scores/rose.parquet", []),
    "subset": ("subsets/davir.jsonl", "subsets/rose.jsonl", []),
    "subsets.json": ("subsets.json", "findings.json", []),
    "comparison.json": ("comparison.json", "subsets.json", []),
    "manifest.json": ("manifest.json", "comparison.json", []),
    "evaluated items": (
        "evaluation/davir-seed0/items.safetensors", "evaluation/base/items.safetensors",
        ["evaluation/davir-seed0/items.safetensors"],
    ),
    "model weights": (
        "models/davir-seed0/adapter_model.safetensors", "models/rose-seed0/adapter_model.safetensors",
        ["models/davir-seed0/*.safetensors"],
    ),
    "Adam moments": (
        "models/warmup/checkpoint-2/adam.safetensors", "models/warmup/checkpoint-4/adam.safetensors",
        ["models/warmup/*.safetensors", "models/warmup/*/*.safetensors"],
    ),
}  # fmt: skip
DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "cut to half": lambda data, other: data[: len(data) // 2],
    "empty": lambda data, other: b"",
    "one byte short": lambda data, other: data[:-1],
    "one bit": lambda data, other: (
        data[: len(data) * 2 // 3] + bytes([data[len(data) * 2 // 3] ^ 1]) + data[len(data) * 2 // 3 + 1 :]
    ),
    "swapped": lambda data, other: other,
}
# Every damage to a shard, and to each other kind one of them; `make test-slow` does all the rest.
CASES = [
    pytest.param(kind, damage, marks=[] if kind == "shard" or (i + k) % len(DAMAGES) == 0 else pytest.mark.slow)
    for i, kind in enumerate(KINDS)
    for k, damage in enumerate(DAMAGES)
]
REFUSED = {"subsets.json"}  # it names subsets that were chosen by hand too, so it isn't thrown away
READ = {"scores", "comparison.json", "manifest.json", "subsets.json"}  # by report, explain and select


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def computed(folder: Path) -> dict[Path, int]:
    """When everything that costs computing was written."""
    patterns = ("work/*/*/0*.safetensors", "models/**/*.safetensors", "evaluation/*/items.safetensors")
    return {p.relative_to(folder): p.stat().st_mtime_ns for pattern in patterns for p in folder.glob(pattern)}


@pytest.fixture(scope="module")
def loaded(tiny_run):
    """One loaded model for all cases."""
    import keepset.train.training  # noqa: F401 - it would keep the name that `folder` puts in `load`'s place
    from keepset.model.load import load

    return load(load_recipe(tiny_run.recipe).model)


@pytest.fixture
def folder(tiny_run, tmp_path, loaded, monkeypatch):
    monkeypatch.setattr("keepset.model.load.load", lambda spec, **more: loaded)
    shutil.copytree(tiny_run.run_dir, tmp_path / "run")
    return tmp_path / "run"


def recipe_for(tiny_run, folder):
    return load_recipe(tiny_run.recipe).model_copy(update={"run_dir": str(folder)})


@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_damage_is_found_and_only_that_part_done_again(tiny_run, folder, monkeypatch, kind, damage):
    monkeypatch.undo() if kind in ("model weights", "Adam moments") else None  # training changes the loaded model
    pattern, other, again = KINDS[kind]
    path = one(folder, pattern)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole, one(folder, other).read_bytes()))
    assert path.read_bytes() != whole
    name = str(path.relative_to(folder))
    if kind in READ:
        read = Run(folder).load_table if path.suffix == ".parquet" else Run(folder).load_json
        with pytest.raises(KeepsetError, match=f"{name}: damaged") as caught:
            read(name)
        assert "\n" not in str(caught.value)
    if kind.startswith("shard") or kind == "Adam moments":  # they are looked at only where scores are missing
        for scores in folder.glob("scores/*.parquet"):
            scores.unlink()
    before = computed(folder)
    said = Console(file=io.StringIO(), width=300)
    recipe = recipe_for(tiny_run, folder)
    if kind in REFUSED:
        with pytest.raises(KeepsetError, match=f"{name}: damaged"):
            run_recipe(recipe, console=said, out=said)
        path.unlink()
    run_recipe(recipe, console=said, out=said)
    assert outcome(folder) == tiny_run.outcome
    if kind not in ("comparison.json", "manifest.json"):  # these hold times too
        assert path.read_bytes() == whole
    changed = {str(p) for p, when in computed(folder).items() if before.get(p) != when}
    allowed = {str(p.relative_to(folder)) for pattern in again for p in folder.glob(pattern)}
    assert changed == allowed
    if kind == "subset":
        assert f"{path}: damaged or edited; written again" in said.file.getvalue()


def test_compare_refuses_damaged_items(tiny_run, folder):
    path = folder / "evaluation/rose-seed0/items.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    job = Job(recipe_for(tiny_run, folder), console=Console(file=io.StringIO()))
    with pytest.raises(KeepsetError, match="rose-seed0/items.safetensors: missing or damaged"):
        evaluated_cells(job)


def test_evaluate_refuses_damaged_weights(tiny_run, folder):
    path = folder / "models/rose-seed0/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    job = Job(recipe_for(tiny_run, folder), console=Console(file=io.StringIO()))
    with pytest.raises(KeepsetError, match="rose-seed0/adapter_model.safetensors: missing or damaged"):
        evaluate_final(job, Learner(job), "rose", 0, None)


def test_other_damage_is_mended_or_told(tiny_run, folder):
    """A finished record, the costs and the quarantine list: done again, or read as far as they are whole."""
    (folder / "evaluation/davir-seed0/done.json").write_text("{")
    (folder / "costs.jsonl").write_bytes(b"\xff\xfe[3]\n3\n" + (folder / "costs.jsonl").read_bytes()[:-5])
    (folder / "quarantine.jsonl").write_text("")
    run_recipe(recipe_for(tiny_run, folder), console=Console(file=io.StringIO()), out=Console(file=io.StringIO()))
    assert outcome(folder) == tiny_run.outcome
    assert (folder / "quarantine.jsonl").read_bytes() == (tiny_run.run_dir / "quarantine.jsonl").read_bytes()


@pytest.mark.parametrize(
    "text", ['{"key": "k", "facts": {}, "files": "x"}', '{"key": 1, "facts": 2, "files": {}}', "[]", "3"]
)
def test_a_record_of_any_form_does_not_count(tmp_path, text):
    (tmp_path / "models/a").mkdir(parents=True)
    (tmp_path / "models/a/done.json").write_text(text)
    assert Run(tmp_path).done("models/a") is None
    with pytest.raises(KeepsetError, match="not finished"):
        Run(tmp_path).require_whole("models/a")


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\x00", "methods: 3\n"])
def test_a_damaged_recipe_is_told_in_one_line(tiny_run, folder, text):
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(KeepsetError) as caught:
        Job(recipe_for(tiny_run, folder), console=Console(file=io.StringIO()))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_scores_of_another_model_or_target_are_not_kept(tiny_run, folder):
    """`--force` keeps what still fits: scores don't, when what they were made of changed."""
    before = (folder / "scores/rose.parquet").read_bytes()
    lines = Path(load_recipe(tiny_run.recipe).target[0].path).read_text().splitlines(keepends=True)
    other = folder.parent / "target.jsonl"
    other.write_text("".join(lines[:2]))
    recipe = recipe_for(tiny_run, folder)
    recipe.target[0].path = str(other)
    said = Console(file=io.StringIO(), width=300)
    run_recipe(recipe, console=said, out=said, force=True)
    assert "davir: scored before, kept" in said.file.getvalue()
    assert "rose: scored before, kept" not in said.file.getvalue()
    assert (folder / "scores/rose.parquet").read_bytes() != before
