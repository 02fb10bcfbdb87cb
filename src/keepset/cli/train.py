"""`keepset train`: a subset of a run folder, or files by SFT, a preference loss or as a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from keepset.cli.options import AsJson, Quiet, RunDir, err, open_job
from keepset.runfolder import layout
from keepset.runfolder.files import json_text


class SubsetByDefault(TyperGroup):
    """A first word that is no command is a subset's name: `keepset train davir` is `keepset train subset davir`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put `subset` before such a word."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["subset", *args]
        return super().resolve_command(ctx, args)


train_app = typer.Typer(
    cls=SubsetByDefault,
    no_args_is_help=True,
    help="Train on a subset of a run folder, or on files (TRL + PEFT); `keepset train davir` is short for "
    "`keepset train subset davir`.",
)
PASS = {"allow_extra_args": True, "ignore_unknown_options": True}

Data = Annotated[list[str], typer.Option("--data", help="training file, folder or hub name; may be repeated")]
Out = Annotated[Path, typer.Option("--output_dir", "--output-dir", help="where the adapter or model goes")]
Seed = Annotated[int, typer.Option("--seed", help="of adapter initialisation, order and dropout")]
Anew = Annotated[bool, typer.Option("--anew", help="don't go on from a checkpoint or take what is finished")]
HeldPairs = Annotated[
    list[str] | None, typer.Option("--eval_data", "--eval-data", help="held-out pairs; may be repeated")
]


def progress() -> Console:
    """Where progress goes: standard error; of several processes only the first one speaks."""
    from keepset.pipeline.train import is_main

    return Console(stderr=True, quiet=err.quiet or not is_main())


def tell(facts: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a training's outcome, once."""
    from keepset.pipeline.train import is_main

    if not is_main():
        return
    if as_json:
        print(json_text(facts))
        return
    print(f"{facts['path']}: {facts['steps']} steps, {facts['seconds']:.0f} s, last loss {facts['last_loss']:.3f}")
    for line in lines:
        print(line)


def interval(mean: dict[str, Any]) -> str:
    """`0.62 (0.50 to 0.74)`."""
    return f"{mean['value']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})"


@train_app.command()
def subset(
    subset: Annotated[str, typer.Argument(help="a subset of the run folder, or `full`")],
    run_dir: RunDir = Path("runs/keepset"),
    seed: Seed = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="any recipe key: --set train.num_train_epochs=1; may be repeated")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the base on a subset, as the run's recipe says, into RUN_DIR/models/SUBSET-seedN.

    Example: keepset train davir --set train.num_train_epochs=1
    """
    from keepset.pipeline.choose import stored_subset
    from keepset.pipeline.learn import Learner, train_final

    job = open_job(run_dir, settings=settings, force=bool(settings))
    with job.run.lock():
        facts = train_final(job, Learner(job), stored_subset(job, subset), seed)
    note = "was there already" if facts["reused"] else f"{facts['steps']} steps, {facts['seconds']:.0f} s"
    job.say(f"{run_dir / layout.model(subset, seed)}: {note}")


@train_app.command(context_settings=PASS)
def sft(
    ctx: typer.Context,
    data: Data,
    output_dir: Out,
    eval_data: Annotated[
        list[str] | None, typer.Option("--eval_data", "--eval-data", help="held-out rows: loss before and after")
    ] = None,
    weight_column: Annotated[
        str | None,
        typer.Option("--weight_column", "--weight-column", help="a column of numbers: what a row counts in the loss"),
    ] = None,
    seed: Seed = 0,
    anew: Anew = False,
    as_json: AsJson = False,
) -> None:
    """Supervised fine-tuning of a model on files; with any further argument of TRL's SFTConfig, PEFT or the model.

    The same command goes on where it was stopped, exactly. Several GPUs: accelerate launch -m keepset train sft …

    Example: keepset train sft --data chosen.jsonl --output_dir models/a --model_name_or_path demo --learning_rate 1e-4
    """
    from keepset.pipeline.train import FileTraining, parse_words, run_sft

    given = parse_words(ctx.args)
    files = FileTraining(data, output_dir, given, seed, not anew, eval_data or [], progress(), weight_column)
    facts = run_sft(files)
    lines = []
    if "heldout_after" in facts:
        before, after = facts["heldout_before"]["token_mean"], facts["heldout_after"]["token_mean"]
        lines = [f"held-out loss, nats a token: {interval(before)} before, {interval(after)} after"]
    tell(facts, as_json, lines)


@train_app.command(context_settings=PASS)
def dpo(
    ctx: typer.Context,
    data: Data,
    output_dir: Out,
    loss: Annotated[str, typer.Option("--loss", help="dpo ipo dpo_mean davir simpo, or another of TRL's")] = "dpo",
    beta: Annotated[float | None, typer.Option("--beta", help="β; default: 0.1, davir 5, simpo 2")] = None,
    eval_data: HeldPairs = None,
    seed: Seed = 0,
    anew: Anew = False,
    as_json: AsJson = False,
) -> None:
    """Preference training on files of chosen / rejected pairs; with any further argument of TRL's DPOConfig.

    `--loss davir` is DavIR-DPO. The base is the reference; its log-probabilities are computed once.

    Example: keepset train dpo --data pairs.jsonl --output_dir models/b --loss davir --num_train_epochs 1
    """
    from keepset.pipeline.train import FileTraining, parse_words, run_dpo

    given = parse_words(ctx.args)
    facts = run_dpo(FileTraining(data, output_dir, given, seed, not anew, eval_data or [], progress()), loss, beta)
    lines = []
    if "preference_after" in facts:
        for group, name in (("length_matched", "pairs of like length"), ("all", "all pairs")):
            before, after = facts["preference_before"][group], facts["preference_after"][group]
            if after["n"]:
                lines.append(
                    f"{name} ({after['n']}): accuracy by mean log-probability "
                    f"{interval(before['policy_mean']['accuracy'])} before, "
                    f"{interval(after['policy_mean']['accuracy'])} after; against the base "
                    f"{interval(after['implicit_mean']['accuracy'])}"
                )
    tell(facts, as_json, lines)


@train_app.command(context_settings=PASS)
def reward(
    ctx: typer.Context,
    data: Data,
    output_dir: Out,
    eval_data: HeldPairs = None,
    share: Annotated[
        float, typer.Option("--heldout_share", "--heldout-share", help="of the prompts, without --eval_data")
    ] = 0.2,
    seed: Seed = 0,
    anew: Anew = False,
    as_json: AsJson = False,
) -> None:
    """Train a reward model on pairs, a judge that works offline; prints its accuracy on held-out pairs.

    Example: keepset train reward --data pairs.jsonl --output_dir models/judge --model_name_or_path demo
    """
    from keepset.errors import RecipeError
    from keepset.pipeline.train import FileTraining, parse_words, run_reward

    if not 0 < share < 1:
        raise RecipeError(f"--heldout_share {share}: a judge is shown with its accuracy; hold out more than 0, below 1")
    given = parse_words(ctx.args)
    facts = run_reward(FileTraining(data, output_dir, given, seed, not anew, eval_data or [], progress()), share)
    tell(facts, as_json, accuracy_lines(facts["heldout"]))


def accuracy_lines(heldout: dict[str, Any] | None) -> list[str]:
    """What is known of a reward model's accuracy, for the screen."""
    if not heldout:
        return ["judge's accuracy on held-out pairs: not measured"]
    lines = [f"judge's accuracy on {heldout['n']} held-out pairs: {interval(heldout['accuracy'])}; "
             f"always naming the longer side gives {heldout['longer']:.3f}"]  # fmt: skip
    if heldout["accuracy_length_matched"]:
        matched = interval(heldout["accuracy_length_matched"])
        lines.append(f"on the {heldout['n_length_matched']} of like length: {matched}")
    return lines
