"""The command line: parse, call, print."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

import typer
from rich.console import Console

from keepset.cli.cluster import work_on
from keepset.cli.deliver import export, init, push, trainers
from keepset.cli.judge import generate, judge, lm_eval, pairs
from keepset.cli.look import doctor, explain, inspect, methods, overlap, plot, report, status
from keepset.cli.options import err
from keepset.cli.train import train_app
from keepset.cli.work import compare, demo, evaluate, plan, reproduce, run, score, select, validate
from keepset.errors import KeepsetError
from keepset.stopping import GOES_ON, Stopped, stop_on_signals, system_trouble

app = typer.Typer(
    help="Choose post-training data for language models, and hold the choice against a random one of its size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    run, plan, demo, score, select, evaluate, compare, validate, overlap, methods, report, plot, inspect, explain, init,
    status, doctor, export, trainers, push, reproduce, generate, judge, pairs,
):  # fmt: skip
    app.command()(command)
app.command("lm-eval")(lm_eval)
app.command("work")(work_on)
app.add_typer(train_app, name="train")


def complain(text: str) -> None:
    """Print a mistake in one line, also with `--quiet`."""
    Console(stderr=True).print(f"keepset: {text}", style="red", highlight=False, markup=False, soft_wrap=True)


class Once(logging.Filter):
    """Lets each message pass once: what a load says is not said again at the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


def main() -> None:
    """Run a command; what a user can mend is printed in one line, with its exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress lines say what is done
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no "…" gets "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Once())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        stop_on_signals()
        app(standalone_mode=False)
    except KeepsetError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except Stopped as stopped:
        err.print(f"keepset: stopped ({stopped}); {GOES_ON}", highlight=False)
        sys.exit(stopped.exit_code)
    except Exception as error:
        trouble = system_trouble(error)
        if trouble is not None:
            complain(trouble)
            sys.exit(2)
        show: Callable[..., None] | None = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
