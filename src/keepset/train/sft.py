"""Supervised fine-tuning through TRL's SFTTrainer, on rows that are tokenised and masked already.

Loss (TRL's default): Σ nll over the supervised tokens of a batch, accumulated batches included, ÷ their number. Long
answers therefore weigh more than short ones inside a batch.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import DataError
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.runfolder.files import canonical, digest, file_digest, misfits, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from keepset.model.encode import Encoded

log = logging.getLogger(__name__)

META = "meta.json"  # written last into a checkpoint: with it the checkpoint is whole
WORK = "trainer"  # the trainer's own checkpoints, inside the result folder while training goes on
RECORD = "training.json"  # written last: with it the result is whole


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        path: folder with adapter_model.safetensors (or the whole model) and training.json.
        steps: optimiser steps.
        tokens: tokens run through the model, prompts and every epoch included.
        supervised_tokens: those of them that count in the loss; None after TRL's own step, which doesn't count them.
        seconds: of training, over all sessions if it was resumed.
        losses: one a logged step, in nats a supervised token (DPO: nats a pair).
    """

    path: Path
    steps: int
    tokens: int
    supervised_tokens: int | None
    seconds: float
    losses: list[float]


def train_sft(
    spec: ModelSpec,
    lora: LoraSpec,
    rows: Sequence[Encoded],
    out: Path,
    args: TrainSpec,
    *,
    seed: int,
    resume: bool = True,
    save_each_epoch_with_moments: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Fine-tune the base on `rows`; LoRA, or all weights with `args.full`.

    The loss is TRL's default (module docstring). The same rows, arguments and seed give the same weights on one
    machine. An interrupted training goes on from its last checkpoint (one an epoch) exactly; a finished one is
    returned as it is.

    Args:
        spec: the base model.
        lora: the adapter; not looked at with `args.full`.
        rows: n encoded rows, each with a supervised token.
        out: result folder; `out/trainer` holds checkpoints while training goes on.
        args: epochs, rate, batch; `args.extra` goes to TRL's SFTConfig.
        seed: of adapter initialisation, row order and dropout.
        resume: False trains anew whatever lies in `out`.
        save_each_epoch_with_moments: keep every epoch's checkpoint as `out/checkpoint-<step>` with Adam's moments.
        console: where progress is shown; None shows none.

    Raises:
        DataError: no rows, a row without a supervised token, or a loss that became NaN.
        RecipeError: see `trainer_config` and `lora_config`.
    """
    from keepset.model.load import load

    base = base_weights(spec)
    done = finished(out, plan_of(spec, lora, rows, args, seed, base, save_each_epoch_with_moments)) if resume else None
    if done is not None:
        return done
    loaded = load(spec)
    return fit_sft(
        loaded.model, loaded.tokenizer, spec, lora, rows, out, args, seed=seed, base=base, resume=resume,
        save_each_epoch_with_moments=save_each_epoch_with_moments, console=console,
    )  # fmt: skip


def fit_sft(
    model: Any,
    tokenizer: Any,
    spec: ModelSpec,
    lora: LoraSpec,
    rows: Sequence[Encoded],
    out: Path,
    args: TrainSpec,
    *,
    seed: int,
    base: str = "",
    resume: bool = True,
    save_each_epoch_with_moments: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """`train_sft` of a model that is in memory; the model is changed. Arguments as there.

    `base` names the model's weights (`base_weights`): what another base left in `out` is no result of this one.
    """
    from datasets import Dataset
    from trl import SFTConfig

    check_rows(rows)
    plan = plan_of(spec, lora, rows, args, seed, base, save_each_epoch_with_moments)
    done = finished(out, plan) if resume else None
    if done is not None:
        return done
    more: dict[str, Any] = {"save_total_limit": None} if save_each_epoch_with_moments else {}
    config: Any = trainer_arguments(SFTConfig, args, out, seed, spec, more)
    data = Dataset.from_dict(
        {
            "input_ids": [np.asarray(r.input_ids).tolist() for r in rows],
            "labels": [np.where(r.supervised, r.input_ids, -100).tolist() for r in rows],
        }
    )
    trainer = sft_trainer(model, tokenizer, config, data, lora if not args.full else None)
    return run_trainer(
        trainer, out, plan, tokenizer=tokenizer, full=args.full, resume=resume, moments=save_each_epoch_with_moments,
        console=console,
    )  # fmt: skip


def trainer_arguments(
    config_class: Any, args: TrainSpec, out: Path, seed: int, spec: ModelSpec, more: dict[str, Any]
) -> Any:
    """`trainer_config` for the work folder inside `out`."""
    from keepset.train.arguments import trainer_config

    return trainer_config(config_class, args, out / WORK, seed=seed, model=spec, **more)


def sft_trainer(model: Any, tokenizer: Any, config: Any, data: Any, lora: LoraSpec | None) -> Any:
    """Make the trainer: packed steps in one process, else TRL's own."""
    from trl import SFTTrainer

    from keepset.model.load import lora_config
    from keepset.train.packed import PackedSteps, collator_for, part_loss

    class PackedSFT(PackedSteps, SFTTrainer):
        _tag_names = ["trl", "sft"]
        _name = "SFT"

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return part_loss(model, inputs["part"], num_items_in_batch)

    class QuietSFT(SFTTrainer):
        _tag_names = ["trl", "sft"]
        _name = "SFT"

        def _send_telemetry(self) -> None:
            return

    more: dict[str, Any] = {"peft_config": lora_config(lora, model)} if lora is not None else {}
    own = (
        config.world_size == 1
        and not (config.bf16 or config.fp16 or config.packing or config.padding_free or config.activation_offloading)
        and config.loss_type == "nll"
        and not config.label_smoothing_factor
    )
    if own:
        more["data_collator"] = collator_for(model, tokenizer.pad_token_id or 0)
    kind = PackedSFT if own else QuietSFT
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)


def run_trainer(
    trainer: Any,
    out: Path,
    plan: str,
    *,
    tokenizer: Any,
    full: bool,
    resume: bool = True,
    moments: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Train (or go on), then put the result into `out` with `training.json` last, and drop the work folder.

    Args:
        trainer: any Hugging Face trainer whose output_dir is `out/trainer`.
        out: result folder.
        plan: hash of everything the result depends on; checkpoints of another plan are not taken up.
        tokenizer: saved beside a full model.
        full: the whole model was trained.
        resume: take up checkpoints.
        moments: keep every checkpoint with Adam's moments.
        console: see `train_sft`.

    Raises:
        DataError: the loss became NaN or infinite.
    """
    from transformers import PrinterCallback

    from keepset.progress import track
    from keepset.train.record import Recorder

    work = out / WORK
    main = trainer.is_world_process_zero()
    if main:
        prepare_work(work, plan, resume)
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_whole_checkpoint(work)
    trainer.remove_callback(PrinterCallback)
    with ExitStack() as stack:
        advance = None
        if console is not None and main:
            advance = stack.enter_context(track(console, f"training {out.name}", planned_steps(trainer), "steps"))
        recorder = Recorder(moments=moments, advance=advance)
        trainer.counted = recorder
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not np.isfinite(recorder.losses).all():
        bad = int(np.flatnonzero(~np.isfinite(recorder.losses))[0]) + 1
        shutil.rmtree(work, ignore_errors=True)
        raise DataError(f"{out.name}: the loss became NaN or infinite at step {bad}; lower learning_rate")
    if main and unchanged(trainer.model):
        log.warning(
            "%s: after %d step(s) the adapter still does nothing: a warm-up starts at the rate 0. Set warmup_ratio: "
            "0, or take more steps (a smaller per_device_train_batch_size)", out.name, trainer.state.global_step
        )  # fmt: skip
    result = TrainResult(
        out,
        trainer.state.global_step,
        recorder.tokens,
        recorder.supervised or None,
        round(recorder.seconds, 3),
        recorder.losses,
    )
    if main:
        publish(trainer, out, tokenizer if full else None, keep_checkpoints=moments)
        record = {"plan": plan, **asdict(result), "path": ".", "learning_rates": recorder.learning_rates}
        record["files"] = {str(p.relative_to(out)): file_digest(p) for p in weight_files(out)}
        write_atomic(out / RECORD, json.dumps(record, indent=1).encode())
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


def unchanged(model: Any) -> bool:
    """Whether a LoRA that started at B = 0 is still there: the model is the base."""
    ups = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(ups) and not any(bool(p.any()) for p in ups)


def planned_steps(trainer: Any) -> int:
    """Optimiser steps the trainer is going to take."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return int(np.ceil(args.num_train_epochs * per_epoch))


def publish(trainer: Any, out: Path, tokenizer: Any | None, *, keep_checkpoints: bool) -> None:
    """Save the weights in a side folder and move them into `out` file by file, replacing what was there.

    The work folder is left whole, so that a crash in here is mended by going on from its last checkpoint.
    """
    side = out / f"{WORK}.result"
    shutil.rmtree(side, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(str(side), safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(side))
    for file in side.iterdir():
        file.replace(out / file.name)
    side.rmdir()
    if keep_checkpoints:
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
        for folder in sorted((out / WORK).glob("checkpoint-*")):
            (out / folder.name).mkdir()
            for file in folder.iterdir():  # optimiser, scheduler and random states serve resuming only
                if file.suffix in (".safetensors", ".json") and file.name != "trainer_state.json":
                    shutil.copyfile(file, out / folder.name / file.name)


def weight_files(out: Path) -> list[Path]:
    """The weights of a result: its own and its checkpoints', with Adam's moments."""
    return sorted([*out.glob("*.safetensors"), *out.glob("checkpoint-*/*.safetensors")])


def prepare_work(work: Path, plan: str, resume: bool) -> None:
    """Keep the whole checkpoints of this very plan and remove everything else in the work folder."""
    from keepset.train.record import is_whole

    stamp = work / "plan"
    same = stamp.exists() and stamp.read_text(encoding="utf-8") == plan
    for folder in work.glob("checkpoint-*"):
        if not is_whole(folder):  # it was being written when the training broke, or it is damaged
            shutil.rmtree(folder)
    if not (resume and same):
        if resume and not same and any(work.glob("checkpoint-*")):
            log.warning("%s: checkpoints of another training are dropped", work)
        shutil.rmtree(work, ignore_errors=True)
        write_atomic(stamp, plan.encode())


def last_whole_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [p.parent for p in work.glob(f"checkpoint-*/{META}")]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def finished(out: Path, plan: str) -> TrainResult | None:
    """The result that lies in `out`, if it is of this plan and its weights are as they were saved.

    What a kill after its last write left of the trainer's own folder is removed.
    """
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if found["plan"] != plan or not found["files"] or misfits(out, found["files"]):
            return None
        result = TrainResult(
            out, found["steps"], found["tokens"], found["supervised_tokens"], found["seconds"], found["losses"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shutil.rmtree(out / WORK, ignore_errors=True)
    return result


def base_weights(spec: ModelSpec) -> str:
    """What the weights are that a training starts from; a name alone would stay when the folder gets others.

    Raises:
        ModelError: nothing there, or as `weights.fingerprint`.
    """
    from keepset.model.load import resolve
    from keepset.model.weights import fingerprint

    return fingerprint(resolve(spec), spec.model_revision, code=spec.trust_remote_code)


def plan_of(
    spec: ModelSpec, lora: LoraSpec, rows: Sequence[Encoded], args: TrainSpec, seed: int, base: str, *more: Any
) -> str:
    """Hash everything a training's result depends on; `base` is of `base_weights`."""
    tokens = digest([digest(np.asarray(r.input_ids, dtype=np.int32).tobytes() + r.supervised.tobytes()) for r in rows])
    parts = {"model": spec.model_dump(mode="json"), "args": args.key(), "rows": tokens, "seed": seed, "base": base}
    return digest(canonical({**parts, "lora": None if args.full else lora.model_dump(), "more": list(more)}))


def check_rows(rows: Sequence[Encoded]) -> None:
    """Refuse an empty training set and rows without a supervised token.

    Raises:
        DataError: as said.
    """
    if not rows:
        raise DataError("no rows to train on")
    empty = [i for i, row in enumerate(rows) if not np.asarray(row.supervised).any()]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} training rows have no supervised token, the first is row {empty[0]}"
        )
