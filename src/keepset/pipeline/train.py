"""`keepset train sft | dpo | reward` on files: words of the command line to sections, rows to trainers, results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import ValidationError
from rich.console import Console

from keepset.data import load_pool
from keepset.errors import DataError, RecipeError, did_you_mean
from keepset.recipe import DataSpec, LoraSpec, ModelSpec, TrainSpec
from keepset.runfolder import layout
from keepset.runfolder.files import canonical, json_text, write_atomic
from keepset.stages.encoded import encode_pool
from keepset.train.arguments import OURS

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.train.training import Training

    Pair = tuple[Encoded, Encoded]


@dataclass(frozen=True)
class Sections:
    """What the command line said about model, adapter and trainer."""

    model: ModelSpec
    lora: LoraSpec
    train: TrainSpec


@dataclass(frozen=True)
class Rows:
    """Usable rows in the order of their ids: their sides, a key of each one's prompt, and their weights, if any."""

    sides: list[tuple[Encoded, ...]]
    prompts: list[str]
    weights: list[float] | None = None


def value_of(words: Sequence[str]) -> Any:
    """The value of an argument from its words: none is True, several are a list, numbers like 2e-5 are numbers."""
    if not words:
        return True
    if len(words) > 1:
        return [value_of([word]) for word in words]
    try:
        return int(words[0])
    except ValueError:
        pass
    try:
        return float(words[0])
    except ValueError:
        pass
    try:
        return yaml.safe_load(words[0])
    except yaml.YAMLError:
        return words[0]


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Turn `--name value`, `--name=value`, `--name v1 v2` and `--flag` into a mapping.

    Raises:
        RecipeError: a word that belongs to no argument, or an argument given twice.
    """
    words_of: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in words_of:
                raise RecipeError(f"--{name} stands twice")
            words_of[name] = [value] if separator else []
        elif name is None:
            raise RecipeError(f"'{word}': write arguments as --name value; files go behind --data")
        else:
            words_of[name].append(word)
    return {name: value_of(values) for name, values in words_of.items()}


def sections(given: dict[str, Any], config_class: type[Any]) -> Sections:
    """Sort arguments into model, adapter and trainer; what the sections don't know is TRL's.

    Raises:
        RecipeError: an argument that none of them has, with the closest one they have; or a wrong value.
    """
    trainers = {f.name for f in fields(config_class) if f.init} - set(OURS)
    own = [name for name in TrainSpec.model_fields if name not in ("extra", "loss", "beta")]
    model, lora, train, extra = {}, {}, {}, {}
    for name, value in given.items():
        if name in ModelSpec.model_fields:
            model[name] = value
        elif name in LoraSpec.model_fields:
            lora[name] = [value] if name == "lora_target_modules" and value != "all-linear" else value
            if isinstance(value, list):
                lora[name] = value
        elif name in own:
            train[name] = value
        elif name in trainers:
            extra[name] = value
        else:
            names = [*ModelSpec.model_fields, *LoraSpec.model_fields, *own, *sorted(trainers)]
            raise RecipeError(
                f"--{name}: neither keepset nor {config_class.__name__} has it{did_you_mean(name, names)}"
            )
    try:
        return Sections(ModelSpec(**model), LoraSpec(**lora), TrainSpec(**train, extra=extra))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None


def read_rows(
    paths: Sequence[str], spec: ModelSpec, console: Console, *, pairs: bool, out: Path | None = None,
    weight_column: str | None = None,
) -> Rows:  # fmt: skip
    """Read and encode files; rows in = used + quarantined, which is said, and written to `out/quarantine.jsonl`.

    Raises:
        DataError: no usable row.
    """
    from keepset.model.encode import Encoder
    from keepset.model.load import load_tokenizer

    pool = load_pool([DataSpec(path=path, pairs=pairs) for path in paths], weight_column=weight_column)
    encoded, refused = encode_pool(pool, Encoder(load_tokenizer(spec), spec))
    places = pool.table.select(["file", "line"]).to_pylist()
    bad = [asdict(q) for q in pool.quarantine]
    bad += [{**places[i], "reason": reason, "detail": detail} for i, reason, detail in refused]
    used = [i for i in np.argsort(pool.ids.astype(str), kind="stable") if encoded[i] is not None]
    console.print(
        f"{', '.join(paths)}: {pool.n_in} rows in = {len(used)} used + {len(bad)} quarantined", highlight=False
    )
    if not used:
        raise DataError(f"{paths[0]}: no usable row; the first: {bad[0]['reason']}: {bad[0]['detail']}")
    if bad and out is not None and is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / layout.QUARANTINE, "".join(canonical(b) + "\n" for b in bad).encode("utf-8", "replace"))
    prompts = [pool.messages(i)[: pool.table["n_prompt"][int(i)].as_py() if pairs else -1] for i in used]
    weights = pool.weights(weight_column)[used].tolist() if weight_column else None
    return Rows([encoded[i] for i in used], [canonical(p) for p in prompts], weights)


def as_pairs(rows: Rows) -> list[Pair]:
    """The rows as (chosen, rejected)."""
    return [(row[0], row[1]) for row in rows.sides]


def hold_out(rows: Rows, share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split pairs by prompt, so that no prompt stands on both sides: (training, held-out)."""
    names = sorted(set(rows.prompts))
    drawn = np.random.default_rng(seed).permutation(len(names))[: round(share * len(names))]
    held = {names[i] for i in drawn}
    pairs = list(zip(rows.prompts, as_pairs(rows), strict=True))
    return [p for prompt, p in pairs if prompt not in held], [p for prompt, p in pairs if prompt in held]


def is_main() -> bool:
    """Whether this is the only process, or the first that `accelerate launch` started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def trained(spec: ModelSpec, out: Path) -> Iterator[Any]:
    """The model that a training left in `out`: an adapter on the base, or whole."""
    from keepset.model.adapters import attached
    from keepset.model.load import load

    if (out / "adapter_config.json").exists():
        with attached(load(spec).model, out) as model:
            yield model
    else:
        yield load(spec.model_copy(update={"model_name_or_path": str(out)})).model


@dataclass(frozen=True)
class FileTraining:
    """A training on files, as a command line asks for it; `given` are the arguments that `sections` sorts."""

    data: Sequence[str]
    out: Path
    given: dict[str, Any]
    seed: int
    resume: bool
    evaluation: Sequence[str]  # held-out files
    console: Console
    weight_column: str | None = None  # of `data`: how much a row counts in the loss

    def training(self, config_class: type[Any]) -> Training:
        """Model, adapter and arguments for a trainer of TRL's."""
        from keepset.train.training import Training

        said = sections(self.given, config_class)
        return Training(said.model, said.lora, said.train, self.seed, resume=self.resume, console=self.console)

    def rows(self, spec: ModelSpec, *, pairs: bool) -> Rows:
        """The rows that are trained on."""
        return read_rows(self.data, spec, self.console, pairs=pairs, out=self.out, weight_column=self.weight_column)

    def held_out(self, spec: ModelSpec, *, pairs: bool) -> Rows:
        """The rows of the held-out files."""
        return read_rows(self.evaluation, spec, self.console, pairs=pairs)


def run_sft(ask: FileTraining) -> dict[str, Any]:
    """Fine-tune on rows; the loss of held-out rows before and after goes to `evaluation.json`."""
    from trl import SFTConfig

    from keepset.evaluate.heldout import heldout_losses, heldout_table
    from keepset.model.load import load
    from keepset.train.sft import train_sft

    training = ask.training(SFTConfig)
    spec = training.model
    rows = ask.rows(spec, pairs=False)
    result = train_sft(replace(training, weights=rows.weights), [row[0] for row in rows.sides], ask.out)
    facts = training_facts(result)
    if ask.evaluation and is_main():
        held = [row[0] for row in ask.held_out(spec, pairs=False).sides]
        facts["heldout_before"] = heldout_table(heldout_losses(load(spec).model, held))
        with trained(spec, ask.out) as model:
            facts["heldout_after"] = heldout_table(heldout_losses(model, held))
    return save_facts(ask.out, facts)


def run_dpo(ask: FileTraining, loss: str, beta: float | None) -> dict[str, Any]:
    """Train on pairs; held-out pairs before and after go to `evaluation.json`."""
    from trl import DPOConfig

    from keepset.evaluate.preference import pair_logps, preference_table
    from keepset.model.load import load
    from keepset.train.preference import PairLoss, train_dpo

    objective = PairLoss.of(loss, beta)
    training = ask.training(DPOConfig)
    spec = training.model
    result = train_dpo(training, as_pairs(ask.rows(spec, pairs=True)), ask.out, objective)
    facts = {**training_facts(result), "loss": objective.name, "beta": objective.beta}
    if ask.evaluation and is_main():
        held = as_pairs(ask.held_out(spec, pairs=True))
        base = pair_logps(load(spec).model, held)
        facts["preference_before"] = preference_table(base)
        with trained(spec, ask.out) as model:
            facts["preference_after"] = preference_table(pair_logps(model, held), base)
    return save_facts(ask.out, facts)


def run_reward(ask: FileTraining, share: float) -> dict[str, Any]:
    """Train a reward model on pairs; its accuracy on held-out pairs (a file's, or a share of the prompts) comes too."""
    from trl import RewardConfig

    from keepset.train.reward import train_reward

    training = ask.training(RewardConfig)
    rows = ask.rows(training.model, pairs=True)
    if ask.evaluation:
        pairs, held = as_pairs(rows), as_pairs(ask.held_out(training.model, pairs=True))
    else:
        pairs, held = hold_out(rows, share, ask.seed)
        ask.console.print(f"held out: {len(held)} pairs ({share:.0%} of the prompts)", highlight=False)
    result = train_reward(training, pairs, ask.out, heldout=held)
    return save_facts(ask.out, {**training_facts(result.train), "heldout": result.heldout})


def training_facts(result: Any) -> dict[str, Any]:
    """Steps, seconds and the last loss of a training."""
    return {"path": str(result.path), "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds,
            "last_loss": result.losses[-1] if result.losses else None}  # fmt: skip


def save_facts(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write `evaluation.json` beside the weights."""
    if is_main():
        write_atomic(out / layout.TRAIN_EVALUATION, json_text(facts, indent=1).encode())
    return facts
