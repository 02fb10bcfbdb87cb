"""Every file and folder of a run, named once; all names are relative to the run folder, with `/`, as `Run` takes them.

Not here: what other libraries name (PEFT's `adapter_config.json`, the trainer's `checkpoint-<step>`), and the files in
a folder that one module alone writes (`trainers/`, `lm-eval/`, a gradient store): it names them itself.
"""

from __future__ import annotations

RECIPE = "recipe.yaml"
LOCK = ".lock"
COSTS = "costs.jsonl"
QUARANTINE = "quarantine.jsonl"
SUBSETS = "subsets.json"
COMPARISON = "comparison.json"
FINDINGS = "findings.json"
VALIDATION = "validation.json"
OVERLAP = "overlap.json"
WHY = "why.json"
MANIFEST = "manifest.json"
CARD = "README.md"
"""What the folder is, in words; also in `trainers/`."""
REPORT = "report.html"

SCORES_FOLDER = "scores"
SUBSETS_FOLDER = "subsets"
MODELS_FOLDER = "models"
EVALUATION_FOLDER = "evaluation"
EPOCHS_FOLDER = "epochs"
VARIANTS_FOLDER = "variants"
DATA_FOLDER = "data"
TRAINERS_FOLDER = "trainers"
PLOTS_FOLDER = "plots"
LM_EVAL_FOLDER = "lm-eval"
VALIDATION_FOLDER = "validation"
STEP_FOLDERS = (
    MODELS_FOLDER, EVALUATION_FOLDER, EPOCHS_FOLDER, f"{VALIDATION_FOLDER}/{MODELS_FOLDER}",
    f"{VALIDATION_FOLDER}/{EVALUATION_FOLDER}",
)  # fmt: skip
"""Each folder in these is a step with a `done.json`."""
WORK_FOLDER = "work"
"""Shards of the stages, and the folder's own bookkeeping."""

ROWS = f"{DATA_FOLDER}/train-00000-of-00001.parquet"
"""The chosen rows, by the name that `load_dataset` looks for."""

WARMUP = f"{MODELS_FOLDER}/warmup"
SEEN_FROM = f"{WORK_FOLDER}/seen_from"
"""Holds the way from the run folder to the folder that it was started in."""
OPEN_COSTS = f"{WORK_FOLDER}/costs-open.json"
PLAN = f"{WORK_FOLDER}/plan.json"
"""What `keepset plan` last said the whole run would take."""
RECORDS_FOLDER = f"{WORK_FOLDER}/records"
WORKERS_COSTS = f"{WORK_FOLDER}/costs"
"""What stages cost other processes than the one that leads, an entry a file, until that one takes it over."""
CLAIMS_FOLDER = f"{WORK_FOLDER}/claims"
"""What the workers of `keepset work` are at."""
BOARD = f"{WORK_FOLDER}/board.json"
"""What the worker that leads has for the others to do."""
PROBE = f"{WORK_FOLDER}/ray-word"
"""Whoever finds this process's word in it shares the folder."""

# Inside the folder of a step, a stage or a model.
DONE = "done.json"
KEY = "key.json"
TRAINING = "training.json"
META = "meta.json"
MOMENTS = "adam.safetensors"
STATE = "state.safetensors"
ITEMS = "items.safetensors"
SUMMARY = "summary.json"
GSM8K_ANSWERS = "gsm8k-answers.json"
POINTS = "points.json"
TOKENS_FOLDER = "tokens"
REWARD_HELDOUT = "heldout.json"
TRAIN_EVALUATION = "evaluation.json"
"""What `keepset train` measured, beside the weights."""


def done(folder: str) -> str:
    """The record of a step that is finished: its key, its facts and its files' checksums."""
    return f"{folder}/{DONE}"


def scores(label: str) -> str:
    """A method's scores."""
    return f"{SCORES_FOLDER}/{label}.parquet"


def subset(name: str) -> str:
    """A subset's rows."""
    return f"{SUBSETS_FOLDER}/{name}.jsonl"


def chosen(label: str, budget: int | str, n_budgets: int) -> str:
    """What a choice is called: `davir`, or `davir@10%` where the recipe has several budgets."""
    return label if n_budgets == 1 else f"{label}@{'-'.join(str(budget).split())}"


def seeded(name: str, seed: int | str) -> str:
    """What a subset's model is called, also inside `evaluation/` and `epochs/`; seed `*` is a pattern for all."""
    return f"{name}-seed{seed}"


def name_and_seed(folder: str) -> tuple[str, int] | None:
    """The subset and the seed of a name made by `seeded`; None for the untrained base."""
    name, _, seed = folder.rpartition("-seed")
    return (name, int(seed)) if name else None


def model(name: str, seed: int | str) -> str:
    """The model trained on a subset."""
    return f"{MODELS_FOLDER}/{seeded(name, seed)}"


def reference(fold: int | None = None) -> str:
    """The reference model, or that of one fold."""
    return f"{MODELS_FOLDER}/reference" + ("" if fold is None else f"-fold{fold}")


def in_run(key: str) -> str:
    """The SGD steps of in-run Shapley."""
    return f"{MODELS_FOLDER}/in-run-{key}"


def metagradient(key: str) -> str:
    """The replayed training of metagradient."""
    return f"{MODELS_FOLDER}/metagradient-{key}"


def evaluation(name: str, seed: int | None) -> str:
    """The evaluation of a subset's model; seed None: of the untrained `name`."""
    return f"{EVALUATION_FOLDER}/{name if seed is None else seeded(name, seed)}"


def validation_model(name: str, seed: int | str) -> str:
    """A model that judges scores: `half-007`, `whole`, `without-003`, `tenth-rose-0`."""
    return f"{VALIDATION_FOLDER}/{model(name, seed)}"


def validation_measured(name: str, seed: int | None) -> str:
    """What was measured on it; seed None: on the untrained base."""
    return f"{VALIDATION_FOLDER}/{evaluation(name, seed)}"


def epochs(name: str, seed: int) -> str:
    """The evaluations of a subset's model after each epoch."""
    return f"{EPOCHS_FOLDER}/{seeded(name, seed)}"


def variant(label: str) -> str:
    """The run folder of a variant."""
    return f"{VARIANTS_FOLDER}/{label}"


def stage(name: str, key: str) -> str:
    """The shards of a stage."""
    return f"{WORK_FOLDER}/{name}/{key}"


def retraining(key: str) -> str:
    """The utilities that retraining Shapley has measured."""
    return f"{WORK_FOLDER}/retraining-{key}.json"


def record(name: str) -> str:
    """The checksums of a file that `Run.save` wrote."""
    return f"{RECORDS_FOLDER}/{name}.json"
