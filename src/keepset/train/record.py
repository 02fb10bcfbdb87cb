"""What a training run leaves behind: its loss curve, its learning rates and, on request, Adam's moments an epoch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from keepset.errors import ModelError
from keepset.features.adam import from_optimizer, save_adam
from keepset.runfolder import layout
from keepset.runfolder.files import file_digest, misfits, write_atomic


class Recorder(TrainerCallback):
    """Keeps the loss and learning rate of every step and writes `meta.json` (last) into every checkpoint.

    A checkpoint without `meta.json` was not finished and doesn't count. The record travels with the checkpoint, so that
    the curve of a resumed run is the whole one.
    """

    def __init__(self, *, moments: bool = False, advance: Any = None) -> None:
        """Start empty; `advance(1)` is called after every step."""
        self.moments = moments
        self.advance = advance
        self.learning_rates: list[float] = []
        self.losses: list[float] = []
        self.tokens = 0
        self.supervised = 0
        self.tokens_before = 0
        self.seconds = 0.0
        self.epoch_start = 0
        self._clock = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the record of the checkpoint that training goes on from."""
        self._clock = time.perf_counter()
        if state.global_step:
            meta = json.loads((Path(args.output_dir) / f"checkpoint-{state.global_step}" / layout.META).read_text())
            self.learning_rates, self.losses = meta["learning_rates"], meta["losses"]
            self.tokens, self.supervised, self.seconds = meta["tokens"], meta["supervised"], meta["seconds"]
            self.epoch_start = state.global_step
            self.tokens_before = self.tokens
            if self.advance:
                self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Keep the scheduler's rate after the step: what a trainer logs, and what LESS averages."""
        self.learning_rates.append(float(lr_scheduler.get_last_lr()[0]))
        if self.advance:
            self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the logged loss, and the tokens where TRL's own step counts them (over all processes)."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
        if logs and "num_tokens" in logs:
            self.tokens = self.tokens_before + int(logs["num_tokens"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the moments and then `meta.json`."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        rates = self.learning_rates[self.epoch_start :]
        meta: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
        if self.moments:
            meta |= save_moments(kwargs["model"], kwargs["optimizer"], folder)
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        meta |= {"mean_lr": sum(rates) / len(rates), "learning_rates": self.learning_rates, "losses": self.losses}
        meta |= {"tokens": self.tokens, "supervised": self.supervised, "seconds": self.seconds}
        written = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != layout.META]
        # other processes write their rng_state_<rank>.pth at their own time
        meta["files"] = {p.name: file_digest(p) for p in written if not p.name.startswith("rng_state_")}
        write_atomic(folder / layout.META, json.dumps(meta).encode())
        self.epoch_start = len(self.learning_rates)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._clock


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end and every file of it is as it was written.

    The trainer's own files are read through torch when training goes on, so nothing else may take their place.
    """
    try:
        files = json.loads((folder / layout.META).read_text(encoding="utf-8"))["files"]
        return bool(files) and not misfits(folder, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def save_moments(model: Any, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Write Adam's moments of every trained parameter, by name, and return `{"betas", "eps"}`.

    LESS's users lacked exactly this: the trainer's own optimiser file has integer keys unless FSDP wrote it.

    Raises:
        ModelError: the optimiser keeps no such moments, or not for every trained parameter.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = from_optimizer(inner, trained)
    missing = trained.keys() - state.exp_avg.keys()
    if missing:
        raise ModelError(f"{type(inner).__name__} keeps no Adam moments for {min(missing)}; use optim: adamw_torch")
    save_adam(state, folder)
    return {"betas": list(state.betas), "eps": state.eps}
