"""The tokens of one row whose loss fell (or rose) from the base to the reference model: what DavIR's score is made of.

Needs the run's model; the reference is never trained here, only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from keepset.errors import KeepsetError
from keepset.report.read import RunData, find_row, read_run
from keepset.runfolder import layout

if TYPE_CHECKING:
    from keepset.model.encode import Encoded

SHOWN = 5
STRONG = 2.0  # nats of change that get the full colour


def token_changes(run_dir: Path, row_id: str) -> dict[str, Any]:
    """Loss of every supervised token of a row under the base and under the run's reference model.

    Returns `id`, `before` and `after` (summed nats) and `tokens`: [{"text", "before", "after"}] in order, nats.

    Raises:
        KeepsetError: no such row, its text is gone, the run has no reference model, or the row can't be encoded.
    """
    return next(iter(tokens_of_rows(run_dir, [row_id]).values()))


def tokens_of_rows(run_dir: Path, row_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`token_changes` of several rows with each model loaded at most once; by id."""
    from keepset.model.encode import Encoder, RowRefused
    from keepset.model.load import load, load_tokenizer

    data = read_run(Path(run_dir))
    ids = [str(data.ids[find_row(data, row_id)]) for row_id in row_ids]
    for id_ in ids:
        if data.recipe is None or id_ not in data.messages:
            raise KeepsetError(f"{run_dir}: the text of row {id_} is gone: its pool file is not where the recipe says")
    assert data.recipe is not None
    by_folder: dict[Path, list[str]] = {}
    for id_ in ids:
        by_folder.setdefault(reference_folder(data, id_), []).append(id_)
    encoder, model = Encoder(load_tokenizer(data.recipe.model), data.recipe.model), None
    out: dict[str, dict[str, Any]] = {}
    for folder, own_ids in by_folder.items():
        try:
            rows = [encoder.encode(data.messages[id_]) for id_ in own_ids]
        except RowRefused as refusal:
            raise KeepsetError(f"{run_dir}: a row of {', '.join(own_ids)[:70]} can't be encoded: {refusal}") from None
        model = model or load(data.recipe.model).model
        befores, afters = token_losses(model, rows, folder, data)
        for id_, row, before, after in zip(own_ids, rows, befores, afters, strict=True):
            tokens = [
                {"text": encoder.tokenizer.decode([token]), "before": float(a), "after": float(b)}
                for token, a, b in zip(row.input_ids[row.supervised].tolist(), before, after, strict=True)
            ]
            sums = {side: sum(t[side] for t in tokens) for side in ("before", "after")}
            out[id_] = {"id": id_, **sums, "tokens": tokens}
    return {id_: out[id_] for id_ in ids}


def reference_folder(data: RunData, id_: str) -> Path:
    """Where the reference model for this row stands.

    Raises:
        KeepsetError: the run trained none.
    """
    assert data.recipe is not None
    spec = data.recipe.reference
    if spec.path:
        return Path(spec.path)
    name = layout.reference()
    if spec.folds >= 2:
        from keepset.data.ids import fold_of

        fold = dict(zip(data.ids.tolist(), fold_of(data.ids, spec.folds).tolist(), strict=True))
        name = layout.reference(fold[id_])
    if not (data.path / name).is_dir():
        raise KeepsetError(f"{data.path}: no reference model here ({name}); `keepset score davir` trains one")
    return data.path / name


def token_losses(model: Any, rows: list[Encoded], folder: Path, data: RunData) -> tuple[list[Any], list[Any]]:
    """Per-token losses of each row under the base and under the reference in `folder`, an adapter or a whole model."""
    from keepset.features.losses import row_losses
    from keepset.model.adapters import attached
    from keepset.model.load import load

    assert data.recipe is not None
    budget = max(data.recipe.batching.token_budget, *(len(row.input_ids) for row in rows))
    if (folder / "adapter_config.json").exists():
        with attached(model, folder) as adapted:
            losses = row_losses(adapted, rows, token_budget=budget, adapters=(False, True), per_token=True)
        assert losses.token_nll is not None
        return losses.token_nll[0], losses.token_nll[1]
    other = load(data.recipe.model.model_copy(update={"model_name_or_path": str(folder)})).model
    both = [row_losses(m, rows, token_budget=budget, per_token=True).token_nll for m in (model, other)]
    assert both[0] is not None and both[1] is not None
    return both[0][0], both[1][0]


def print_token_changes(facts: dict[str, Any], console: Console) -> None:
    """The row's tokens, green where the loss fell and red where it rose, and the largest changes as numbers."""
    text = Text()
    for token in facts["tokens"]:
        change = token["before"] - token["after"]
        depth = int(40 + 160 * min(1.0, abs(change) / STRONG))
        style = f"on rgb(0,{depth},0)" if change > 0 else f"on rgb({depth},0,0)"
        text.append(token["text"], style=f"white {style}")
    console.print(text)
    share = (facts["before"] - facts["after"]) / facts["before"] if facts["before"] else 0.0
    console.print(
        f"loss {facts['before']:.3f} → {facts['after']:.3f} nats ({share:+.1%} of it learned)", highlight=False
    )
    order = sorted(facts["tokens"], key=lambda t: t["after"] - t["before"])
    for title, candidates in (("fell most", order[:SHOWN]), ("rose most", order[::-1][:SHOWN])):
        sign = 1 if title == "fell most" else -1
        moved = [t for t in candidates if sign * (t["before"] - t["after"]) > 0]
        listed = "  ".join(f"{t['text']!r} {t['before']:.2f}→{t['after']:.2f}" for t in moved)
        console.print(Text(f"{title}: {listed or 'none'}"))
