"""Subsets: which rows each method, control and mix keeps at each budget, and the files that a trainer takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keepset.budget_text import parse_budget
from keepset.data.export import write_subset
from keepset.errors import DataError, RecipeError, did_you_mean
from keepset.lazy import Lazy
from keepset.methods.method import NOISE
from keepset.methods.table import METHODS, method_of
from keepset.recipe import MethodSpec, MixSpec, SelectSpec, check_label
from keepset.row_ids import BLOCK, Ids
from keepset.runfolder import layout
from keepset.runfolder.files import file_digest
from keepset.runfolder.records import Kind, StoredEdge, StoredSubset, read_json
from keepset.selection.edge import COARSE_NOISE, Stability, stability
from keepset.selection.select import BY_COLUMNS, BY_TEXTS, select

if TYPE_CHECKING:
    from keepset.runfolder.run import Run
    from keepset.stages.job import Job

MOST_NAMED = 100  # rows left out in doubt that are named; the chosen ones all are


@dataclass(frozen=True)
class Subset:
    """One chosen training set.

    `indices` point into the job's usable rows, best first; `edge` names those that numerical noise might exchange. Only
    `dpo-direct` has none: it trains on `pairs` pairs of the target.
    """

    name: str
    label: str
    kind: Kind
    budget: str
    indices: np.ndarray
    n_tokens: int
    edge: Stability | None = None
    pairs: int = 0

    @property
    def n_rows(self) -> int:
        """Rows kept (or pairs)."""
        return self.pairs or len(self.indices)

    def ids(self, job: Job) -> Ids:
        """Their ids, best first."""
        return job.ids[self.indices]


def choose(job: Job, label: str, budget: int | str, *, kind: Kind = "method", overrides: Path | None = None) -> Subset:
    """Select rows by the stored scores of `label` and write the subset's files.

    `overrides` is a JSON file `{"keep": [ids], "drop": [ids]}` (the report writes it): kept rows come first, within the
    budget; dropped ones never.

    Raises:
        KeepsetError: `label` has not been scored in this run folder.
        RecipeError: the budget can't be met by the policy.
    """
    noisy = noisy_spec(job, label) if kind == "method" and overrides is None else None
    wanted = looked_at(job.recipe.select) if noisy is None else None
    table = job.run.load_table(layout.scores(check_label(label)), wanted)
    if overrides is not None:
        table = apply_overrides(table, overrides)
    indices = select_rows(job, table, budget, job.recipe.select)
    name = layout.chosen(label, budget, len(job.recipe.budget))
    edge = None if noisy is None else edge_of(job, noisy, table, indices)
    del table
    pa.default_memory_pool().release_unused()
    subset = Subset(name, label, kind, str(budget), indices, int(job.n_tokens()[indices].sum()), edge)
    return finish(job, subset)


def noisy_spec(job: Job, label: str) -> MethodSpec | None:
    """The method of a label, where numerical noise can decide what is chosen by it.

    None where no model runs, or the score alone doesn't decide: other policies than top-k, dropped duplicates.
    """
    spec = next((m for m in job.recipe.methods if m.label == label), None)
    plain = job.recipe.select.policy == "top_k" and job.recipe.select.dedup == "none"
    return None if spec is None or not plain or "text" in METHODS[spec.name].needs else spec


def looked_at(spec: SelectSpec, source: str | None = None) -> Callable[[str], bool]:
    """Whether a column of a scores table is looked at to choose rows (of one source, if given)."""
    names = {"id", "score"} | ({"source"} if source is not None else set())
    if spec.quota != "none":
        names.add("source" if spec.quota_by == "source" else "category")
    return lambda name: name in names or (spec.policy in BY_COLUMNS and name.startswith("task."))


def edge_of(job: Job, spec: MethodSpec, table: pa.Table, indices: np.ndarray) -> Stability | None:
    """The chosen rows that numerical noise might have left out, and the other way round.

    None where the noise isn't known or can't decide (`Method.noise`).
    """
    columns = {name: table[name].to_numpy() for name in table.column_names if pa.types.is_floating(table[name].type)}
    relative = NOISE if job.recipe.model.dtype == "float32" else COARSE_NOISE
    with np.errstate(divide="ignore", invalid="ignore"):  # rows without a score, which don't count
        columns["n_tokens"] = scored_tokens(job, spec)
        noise = method_of(spec).noise(columns, relative)
    if noise is None:
        return None
    chosen = pc.is_in(table["id"], job.ids[indices].arrow()).to_numpy()
    return stability(columns["score"], table["id"].to_numpy(zero_copy_only=False), chosen, noise=noise)


def scored_tokens(job: Job, spec: MethodSpec) -> np.ndarray:
    """(n,) tokens that a method's losses are summed over: of a pair the chosen side's, ends of turns as it wants."""
    rows = job.rows_of(method_of(spec).summed_over)
    counts = rows.tokens.counts() if isinstance(rows.tokens, Lazy) else None
    return np.array([int(row.supervised.sum()) for row in rows.tokens]) if counts is None else counts[1].astype(int)


def apply_overrides(table: pa.Table, path: Path) -> pa.Table:
    """Put the marked rows above all others, and the dropped ones out of the running.

    Raises:
        RecipeError: the file isn't such a file, or names an id that was never scored.
    """
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))
        keep, drop = set(marks.get("keep", [])), set(marks.get("drop", []))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RecipeError(f'{path}: not an overrides file {{"keep": [ids], "drop": [ids]}}: {error}') from None
    ids = table["id"].to_pylist()
    unknown = sorted((keep | drop) - set(ids))
    if unknown:
        raise RecipeError(f"{path}: id {unknown[0]} is not in this run's scores ({len(unknown)} such ids)")
    scores = table["score"].to_pylist()
    top = max((s for s in scores if s is not None), default=0.0)
    lifted = [None if i in drop else (s + 1 + top - min(s, 0.0) if i in keep and s is not None else s)
              for i, s in zip(ids, scores, strict=True)]  # fmt: skip
    return table.set_column(table.column_names.index("score"), "score", pa.array(lifted, pa.float64()))


def select_rows(
    job: Job, table: pa.Table, budget: int | str, spec: SelectSpec, *, source: str | None = None
) -> np.ndarray:
    """Indices into the job's usable rows, best first, by the scores in `table`; only rows of `source`, if given."""
    table = table.select([name for name in table.column_names if looked_at(spec, source)(name)])
    columns = [name for name in table.column_names if name.startswith("task.")]
    grouped = "source" if spec.quota_by == "source" else "category"
    scored = table if not table["score"].null_count else table.filter(pc.is_valid(table["score"]))
    if source is not None:
        scored = scored.filter(pc.equal(scored["source"], source))
    keep = places_of(job.ids, scored["id"])
    if len(keep) and keep.min() < 0:  # rows that are no longer in the pool
        scored, keep = scored.filter(pa.array(keep >= 0)), keep[keep >= 0]
    ids = job.ids if len(keep) == len(job.ids) and np.array_equal(keep, np.arange(len(keep))) else job.ids[keep]
    n_tokens = job.n_tokens()[keep]
    parsed = parse_budget(budget, len(keep), int(n_tokens.sum()))
    groups = None if spec.quota == "none" else ["" if g is None else g for g in scored[grouped].to_pylist()]
    wants_text = spec.dedup != "none" or spec.policy in BY_TEXTS
    texts = job.texts() if wants_text else None
    chosen = select(
        scored["score"].to_numpy(),
        ids,
        parsed,
        spec=spec,
        n_tokens=n_tokens,
        groups=groups,
        per_task=np.stack([scored[name].to_numpy() for name in columns], axis=1) if columns else None,
        texts=texts.take(keep) if texts is not None else None,
        seed=job.recipe.seed,
    )
    return keep[chosen]


def chosen_places(ids: Ids, chosen: Sequence[str], name: str) -> np.ndarray:
    """Where a subset's rows stand among a pool's ids, (k,).

    Raises:
        DataError: one of them isn't there.
    """
    places = ids.places(chosen)
    if len(places) and places.min() < 0:
        lost = chosen[int(places.argmin())]
        raise DataError(f"{name}: row {lost} is not in the pool any more; score and select again in another --run_dir")
    return places


def places_of(ids: Ids, column: pa.ChunkedArray) -> np.ndarray:
    """Where a column's ids stand among a job's, (k,); -1 for one that doesn't."""
    places = np.empty(len(column), dtype=np.int64)
    start = 0
    for batch in pa.table({"id": column}).to_batches(max_chunksize=BLOCK):
        names = batch.column(0).to_pylist()
        end = start + len(names)
        alike = end <= len(ids) and list(ids[start:end]) == names  # a table of scores has the pool's order
        places[start:end] = np.arange(start, end) if alike else ids.places(names)
        start = end
    return places


def choose_mix(job: Job, mix: MixSpec) -> Subset:
    """Put a training set together from several pools, each by its own method and budget.

    Raises:
        RecipeError: a part names no pool of the recipe.
    """
    sources = {str(s) for s in job.pool.sources()}
    parts = []
    for part in mix.parts:
        if part.source not in sources:
            hint = did_you_mean(part.source, sorted(sources)) or f"; pools are: {', '.join(sorted(sources))}"
            raise RecipeError(f"mix {mix.label}: no pool '{part.source}'{hint}")
        if part.method == "full":
            parts.append(np.flatnonzero(np.asarray(job.pool.sources())[job.usable].astype(str) == part.source))
        else:
            wanted = looked_at(job.recipe.select, part.source)
            table = job.run.load_table(layout.scores(part.method), wanted)
            parts.append(select_rows(job, table, part.budget, job.recipe.select, source=part.source))
    indices = np.concatenate(parts)
    return finish(job, Subset(mix.label, mix.label, "mix", "mix", indices, int(job.n_tokens()[indices].sum())))


def full_subset(job: Job) -> Subset:
    """The whole usable pool."""
    return Subset("full", "full", "full", "100%", np.arange(len(job.ids)), int(job.n_tokens().sum()))


def direct_subset(job: Job) -> Subset:
    """The target's pairs themselves, beside the first budget: what choosing from the pool must beat.

    Raises:
        RecipeError: the target has no pairs.
    """
    if not job.target.has_pairs:
        raise RecipeError("controls.dpo_direct needs pairs: the target has no `rejected`")
    pairs = job.target_pairs[0]
    n_tokens = sum(int(side.supervised.sum()) for pair in pairs for side in pair if side is not None)
    none, budget = np.zeros(0, dtype=np.int64), str(job.recipe.budget[0])
    return Subset("dpo-direct", "dpo-direct", "dpo-direct", budget, none, n_tokens, pairs=len(pairs))


def control_methods(job: Job) -> list[tuple[MethodSpec, Kind]]:
    """The controls' scoring: Random by seed, the longest and the shortest completions."""
    controls = job.recipe.controls
    specs: list[tuple[MethodSpec, Kind]] = [
        (MethodSpec(name="random", label=f"random-{seed}", options={"seed": seed}), "random")
        for seed in controls.random_seeds
    ]
    if controls.longest:
        specs.append((MethodSpec(name="length", label="longest"), "longest"))
    if controls.shortest:
        specs.append((MethodSpec(name="length", label="shortest", options={"prefer": "short"}), "shortest"))
    return specs


def finish(job: Job, subset: Subset) -> Subset:
    """Write `subsets/<name>` in the input's own dialect, mark the rows in the scores, and note the subset."""
    path = job.run.path / layout.subset(subset.name)
    chosen_before = stored_subsets(job.run)
    ids = tuple(str(i) for i in subset.ids(job))
    before = chosen_before.get(subset.name)
    if path.exists() and before is not None and before.ids == ids and before.sha256 != file_digest(path):
        job.say(f"{path}: damaged or edited; written again")
    write_subset(job.pool, job.usable[subset.indices], path)
    edge = None
    if subset.edge is not None:
        left_out = tuple(subset.edge.left_out[:MOST_NAMED])
        edge = StoredEdge(tuple(subset.edge.chosen), left_out, subset.edge.gap, subset.edge.share)
    stored = StoredSubset(
        subset.name, subset.label, subset.kind, subset.budget, subset.n_tokens, subset.pairs, subset.n_rows,
        layout.subset(subset.name), file_digest(path), ids, edge,
    )  # fmt: skip
    index = {**chosen_before, subset.name: stored}
    job.run.save_json(layout.SUBSETS, {name: one.to_json() for name, one in index.items()})
    mark_selected(job, subset)
    job.say(f"{subset.name}: keeps {subset.n_rows} of {len(job.ids)} rows ({subset.n_tokens} {job.length_unit})")
    return subset


def mark_selected(job: Job, subset: Subset) -> None:
    """Set the `selected` column of the label's scores, for the first budget only."""
    name = layout.scores(subset.label)
    first = layout.chosen(subset.label, job.recipe.budget[0], len(job.recipe.budget))
    if subset.name != first or not (job.run.path / name).exists():
        return
    ids = subset.ids(job).arrow()

    def marked(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index("selected"), "selected", pc.is_in(table["id"], ids))

    job.run.change_table(name, marked)


def stored_subsets(run: Run) -> dict[str, StoredSubset]:
    """Every subset that was chosen in the folder, by its name."""
    stored: dict[str, StoredSubset] = read_json(
        dict[str, StoredSubset], run.load_json(layout.SUBSETS, {}), str(run.path / layout.SUBSETS)
    )
    return stored


def stored_ids(job: Job, name: str) -> list[str]:
    """The ids of a subset chosen earlier, best first; `full` is the whole pool.

    Raises:
        RecipeError: there is none of that name.
    """
    if name == "full":
        return [str(i) for i in job.ids]
    return list(find_subset(job.run, name).ids)


def find_subset(run: Run, name: str) -> StoredSubset:
    """The subset of that name.

    Raises:
        RecipeError: there is none.
    """
    index = stored_subsets(run)
    if name not in index:
        hint = did_you_mean(name, list(index)) or f"; there are: {', '.join(index) or 'none, run `keepset select`'}"
        raise RecipeError(f"no subset '{name}' in {run.path}{hint}")
    return index[name]


def stored_subset(job: Job, name: str) -> Subset:
    """A subset chosen earlier, from `subsets.json`.

    Raises:
        RecipeError: there is none of that name.
    """
    if name == "full":
        return full_subset(job)
    if name == "dpo-direct":
        return direct_subset(job)
    stored = find_subset(job.run, name)
    indices = chosen_places(job.ids, stored.ids, name)
    return Subset(name, stored.label, stored.kind, stored.budget, indices, stored.n_tokens)
