"""A Hugging Face trainer, run to its end: it goes on where it stopped, and its result appears whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback

from keepset.errors import DataError
from keepset.progress import track
from keepset.runfolder import layout
from keepset.runfolder.files import file_digest, misfits, write_atomic
from keepset.train.record import Recorder, is_whole
from keepset.train.training import WORK, Training, TrainResult

log = logging.getLogger(__name__)


def run_trainer(training: Training, trainer: Any, tokenizer: Any, out: Path, plan: str) -> TrainResult:
    """Train (or go on), then put the result into `out` with `training.json` last, and drop the work folder.

    The trainer's output_dir is `out/trainer`; checkpoints of another `plan` (see `Training.plan`) are not taken up.

    Raises:
        DataError: the loss became NaN or infinite.
    """
    work = out / WORK
    main = trainer.is_world_process_zero()
    if main:
        prepare_work(work, plan, training.resume)
    trainer.accelerator.wait_for_everyone()
    recorder = _train(training, trainer, out.name, last_whole_checkpoint(work))
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
        publish(trainer, out, tokenizer if training.args.full else None, keep_checkpoints=training.moments)
        record = {"plan": plan, **asdict(result), "path": ".", "learning_rates": recorder.learning_rates}
        record["files"] = {str(p.relative_to(out)): file_digest(p) for p in weight_files(out)}
        write_atomic(out / layout.TRAINING, json.dumps(record, indent=1).encode())
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


def _train(training: Training, trainer: Any, name: str, checkpoint: Path | None) -> Recorder:
    """Run the trainer from a checkpoint or from the start, under a progress bar, and return its record."""
    trainer.remove_callback(PrinterCallback)
    with ExitStack() as stack:
        advance = None
        if training.console is not None and trainer.is_world_process_zero():
            advance = stack.enter_context(track(training.console, f"training {name}", planned_steps(trainer), "steps"))
        recorder = Recorder(moments=training.moments, advance=advance)
        trainer.counted = recorder
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return recorder


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
    """Save the weights in a side folder and move them into `out` file by file, checkpoints whole, replacing the old.

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
    if keep_checkpoints:
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
        for folder in sorted((out / WORK).glob("checkpoint-*")):
            (side / folder.name).mkdir()
            for file in folder.iterdir():  # optimiser, scheduler and random states serve resuming only
                if file.suffix in (".safetensors", ".json") and file.name != "trainer_state.json":
                    shutil.copyfile(file, side / folder.name / file.name)
            (side / folder.name).replace(out / folder.name)
    side.rmdir()


def weight_files(out: Path) -> list[Path]:
    """The weights of a result: its own and its checkpoints', with Adam's moments."""
    return sorted([*out.glob("*.safetensors"), *out.glob("checkpoint-*/*.safetensors")])


def prepare_work(work: Path, plan: str, resume: bool) -> None:
    """Keep the whole checkpoints of this very plan and remove everything else in the work folder."""
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
    folders = [p.parent for p in work.glob(f"checkpoint-*/{layout.META}")]
    return max(folders, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def finished(out: Path, plan: str) -> TrainResult | None:
    """The result that lies in `out`, if it is of this plan and its weights are as they were saved.

    What a kill after its last write left of the trainer's own folder is removed.
    """
    try:
        record = json.loads((out / layout.TRAINING).read_text(encoding="utf-8"))
        if record["plan"] != plan or not record["files"] or misfits(out, record["files"]):
            return None
        result = TrainResult(
            out, record["steps"], record["tokens"], record["supervised_tokens"], record["seconds"], record["losses"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shutil.rmtree(out / WORK, ignore_errors=True)
    return result
