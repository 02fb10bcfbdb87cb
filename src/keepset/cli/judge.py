"""`keepset generate`, `judge`, `pairs` and `lm-eval`: answers, verdicts on them, and preference pairs made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepset.cli.options import AsJson, RunDir, open_job
from keepset.cli.train import accuracy_lines, interval, progress
from keepset.errors import DataError, ModelError, RecipeError
from keepset.runfolder import layout
from keepset.runfolder.files import json_text, write_atomic

if TYPE_CHECKING:
    from keepset.judging.judge import HttpJudge, RewardJudge

Model = Annotated[str, typer.Option("--model_name_or_path", "--model-name-or-path", help="hub name, folder or `demo`")]
Reward = Annotated[Path | None, typer.Option("--reward", help="a reward model: what `keepset train reward` wrote")]
RewardBase = Annotated[
    str | None, typer.Option("--reward_base", "--reward-base", help="its base; default: what its adapter names")
]
Endpoint = Annotated[str | None, typer.Option("--endpoint", help="an OpenAI-compatible address, https://host/v1")]
JudgeModel = Annotated[str | None, typer.Option("--judge_model", "--judge-model", help="the model's name there")]
Cache = Annotated[Path | None, typer.Option("--cache", help="JSONL file that keeps the endpoint's replies")]
Price = Annotated[
    tuple[float, float], typer.Option("--price", help="of a million prompt and a million completion tokens")
]


def generate(
    prompts: Annotated[Path, typer.Argument(help="rows with `prompt`, `instruction` or `question`")],
    out: Annotated[Path, typer.Option("--out", help="where the answers go")],
    model_name_or_path: Model = "demo",
    adapter: Annotated[Path | None, typer.Option("--adapter", help="a trained adapter's folder")] = None,
    n: Annotated[int, typer.Option("--n", help="answers a prompt; more than one are sampled")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy; default with --n: 1")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", "--max-new-tokens")] = 256,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Answer prompts: AlpacaEval's model_outputs.json, or with --n JSON lines of prompt and answer for `keepset pairs`.

    Example: keepset generate instructions.jsonl --out model_outputs.json --adapter models/a
    """
    from contextlib import nullcontext

    from keepset.evaluate.generate import generate as answer
    from keepset.evaluate.generate import write_model_outputs
    from keepset.model.adapters import attached
    from keepset.model.load import load
    from keepset.recipe import ModelSpec

    texts = read_prompts(prompts)
    loaded = load(ModelSpec(model_name_or_path=model_name_or_path))
    chats = [[{"role": "user", "content": text}] for text in texts]
    temperature = 1.0 if n > 1 and not temperature else temperature
    with attached(loaded.model, adapter) if adapter else nullcontext(loaded.model) as model:
        drawn = [
            answer(model, loaded.encoder, chats, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + k)
            for k in range(n)
        ]
    if n == 1:
        write_model_outputs(out, str(adapter or model_name_or_path), texts, [a.text for a in drawn[0]])
    else:
        rows = [{"prompt": t, "answer": d[i].text} for i, t in enumerate(texts) for d in drawn]
        write_lines(out, rows)
    cut = sum(not a.finished for d in drawn for a in d)
    print(f"{out}: {n * len(texts)} answers to {len(texts)} prompts, {cut} of them cut at {max_new_tokens} tokens")


def judge(
    outputs: Annotated[Path, typer.Argument(help="a model's answers: AlpacaEval's model_outputs.json")],
    baseline: Annotated[Path, typer.Argument(help="the baseline's, in the same form")],
    reward: Reward = None,
    reward_base: RewardBase = None,
    endpoint: Endpoint = None,
    judge_model: JudgeModel = None,
    cache: Cache = None,
    price: Price = (0.0, 0.0),
    as_json: AsJson = False,
) -> None:
    """Win rate of a model's answers over a baseline's, raw and length-controlled, beside what is known of the judge.

    Example: keepset judge model_outputs.json baseline.json --reward models/judge
    """
    from dataclasses import asdict

    import numpy as np

    from keepset.judging.judge import Comparison
    from keepset.judging.win_rate import win_rate

    named = NamedJudge(reward, reward_base, endpoint, judge_model, cache, price)
    ours, theirs = read_outputs(outputs), read_outputs(baseline)
    shared = [i for i in ours if i in theirs]
    if not shared:
        raise DataError(f"{outputs} and {baseline} share no instruction")
    items = [Comparison(i, ours[i], theirs[i]) for i in shared]
    opened = named.open_reward() if reward is not None else None
    verdicts = opened.compare(items) if opened else named.open_endpoint().compare(items)
    kept = np.flatnonzero(np.isfinite(verdicts.preference))
    if not kept.size:
        raise DataError(f"no verdict on any of {len(items)} comparisons could be read")
    rates = win_rate(
        verdicts.preference[kept], [len(items[i].answer) for i in kept], [len(items[i].baseline) for i in kept]
    )
    heldout = opened.heldout if opened else None
    facts = {"compared": len(kept), "unshared": len(ours) + len(theirs) - 2 * len(shared), **rates.as_dict(),
             "first_share": verdicts.first_share, "consistency": verdicts.consistency,
             **{k: v for k, v in asdict(verdicts).items() if k not in ("preference", "verdicts")},
             "judge_heldout": heldout}  # fmt: skip
    if as_json:
        print(json_text(facts))
        return
    print(f"win rate over {len(kept)} prompts: {interval(facts['raw'])}; "
          f"length-controlled: {interval(facts['length_controlled'])}")  # fmt: skip
    print(f"{rates.wins} wins, {rates.ties} ties, {rates.losses} losses; longer in {rates.longer:.0%}; "
          f"both orders agree in {verdicts.consistency:.0%}")  # fmt: skip
    if opened is None:
        print(f"{verdicts.requests} requests, {verdicts.cached} from the cache, {verdicts.unreadable} unreadable "
              f"replies, cost {verdicts.cost:.2f}")  # fmt: skip
    for line in accuracy_lines(heldout):
        print(line)


def pairs(
    data: Annotated[Path, typer.Argument(help="rows of one answer each: prompt, answer, score")],
    out: Annotated[Path, typer.Option("--out", help="where the pairs go (JSON lines)")],
    prompt: Annotated[str, typer.Option("--prompt", help="column of the prompt")] = "prompt",
    answer: Annotated[str, typer.Option("--answer", help="column of the answer")] = "answer",
    score: Annotated[str, typer.Option("--score", help="column of the score, where no judge is named")] = "score",
    task: Annotated[str | None, typer.Option("--task", help="column of the task")] = None,
    shp: Annotated[bool, typer.Option("--shp", help="the rows are SHP's own")] = False,
    reward: Reward = None,
    reward_base: RewardBase = None,
    endpoint: Endpoint = None,
    judge_model: JudgeModel = None,
    cache: Cache = None,
    price: Price = (0.0, 0.0),
    min_ratio: Annotated[
        float, typer.Option("--min_ratio", "--min-ratio", help="best score over worst; ROSE takes 3 for SHP")
    ] = 1.0,
    min_gap: Annotated[float, typer.Option("--min_gap", "--min-gap", help="best score less worst")] = 0.0,
    min_best: Annotated[float | None, typer.Option("--min_best", "--min-best", help="least best score")] = None,
    length_share: Annotated[
        float | None, typer.Option("--length_share", "--length-share", help="sides differ by at most this share")
    ] = None,
) -> None:
    """Make preference pairs, best against worst, of scored answers, or of generated ones that a judge ranks.

    Example: keepset pairs answers.jsonl --out pairs.jsonl --min_ratio 3 --length_share 0.2
    """
    from collections import Counter
    from dataclasses import asdict

    from keepset.judging.pairs import AnswerColumns, PairRule, best_against_worst, group_answers, shp_answers
    from keepset.judging.rank import rank_by_comparison, rank_by_reward

    rows, judged = read_columns(data), reward is not None or endpoint is not None
    named = NamedJudge(reward, reward_base, endpoint, judge_model, cache, price)
    try:
        items = shp_answers(rows) if shp else group_answers(
            rows, AnswerColumns(prompt, answer, score, task), scored=not judged
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{data}: a row without {error}; name the columns with --prompt, --answer, --score") from None
    if reward is not None:
        opened = named.open_reward()
        items = rank_by_reward(opened, items)
        for line in accuracy_lines(opened.heldout):
            print(line)
    elif judged:
        items, said = rank_by_comparison(named.open_endpoint(), items)
        print(f"{said.requests} requests, {said.unreadable} unreadable replies, cost {said.cost:.2f}; "
              f"both orders agree in {said.consistency:.0%}")  # fmt: skip
    made, skipped = best_against_worst(items, PairRule(min_ratio, min_gap, min_best, length_share))
    write_lines(out, [asdict(pair) for pair in made])
    reasons = "".join(f", {reason} {n}" for reason, n in Counter(s.reason for s in skipped).most_common())
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in made)
    print(f"{out}: {len(items)} prompts = {len(made)} pairs + {len(skipped)} left out{reasons}; "
          f"chosen is longer in {longer / max(1, len(made)):.0%}")  # fmt: skip


def lm_eval(
    run_dir: RunDir = Path("runs/keepset"),
    tasks: Annotated[str, typer.Option("--tasks", help="further lm-eval tasks: gsm8k,mmlu")] = "",
) -> None:
    """Write a run's held-out pairs as an lm-eval task and print the commands for its models.

    lm-eval stays in an environment of its own: pip install lm_eval (with torch, transformers and peft).

    Example: keepset lm-eval --run_dir runs/mine --tasks gsm8k
    """
    from keepset.evaluate.lm_eval import command, write_pair_task
    from keepset.model.load import resolve
    from keepset.pipeline.learn import Learner

    job = open_job(run_dir)
    learner = Learner(job)
    named = [t for t in tasks.split(",") if t]
    folder = run_dir / layout.LM_EVAL_FOLDER
    if learner.eval_pairs:
        write_pair_task(folder, "keepset_pairs", learner.encoder.tokenizer, learner.eval_pairs[0])
        named.insert(0, "keepset_pairs")
    if not named:
        raise RecipeError("nothing to hand over: the recipe has no held-out pairs and --tasks names no task")
    base, names = str(resolve(learner.spec)), ",".join(named)
    print(command(base, None, names, folder, folder / "base"))
    for path in sorted((run_dir / layout.MODELS_FOLDER).glob(layout.seeded("*", "*"))):
        whole = not (path / "adapter_config.json").exists()
        print(command(str(path) if whole else base, None if whole else path, names, folder, folder / path.name))


def read_columns(path: Path) -> list[dict[str, Any]]:
    """A file's rows as they are.

    Raises:
        DataError: a row that can't be read.
    """
    from keepset.data.readers import open_all

    columns = []
    for opened in open_all(str(path), "train"):
        for item in opened.rows:
            if not isinstance(item, tuple):
                raise DataError(f"{item.file}:{item.line}: {item.reason}: {item.detail}")
            columns.append(item[2])
    return columns


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once, in their order.

    Raises:
        DataError: a row without one.
    """
    texts: dict[str, None] = {}
    for number, row in enumerate(read_columns(path), start=1):
        text = next((row[k] for k in ("prompt", "instruction", "question") if isinstance(row.get(k), str)), None)
        if not text or not text.strip():
            raise DataError(f"{path}: row {number} has no `prompt`, `instruction` or `question`")
        more = row.get("input")
        texts.setdefault(f"{text}\n{more}" if isinstance(more, str) and more.strip() and "prompt" not in row else text)
    return list(texts)


def read_outputs(path: Path) -> dict[str, str]:
    """Instruction -> answer of AlpacaEval's `model_outputs.json`.

    Raises:
        DataError: rows of another form.
    """
    rows = read_columns(path)
    if not rows or not all(isinstance(r.get("instruction"), str) and isinstance(r.get("output"), str) for r in rows):
        raise DataError(f"{path}: rows need `instruction` and `output`, as AlpacaEval's model_outputs.json has them")
    return {r["instruction"]: r["output"] for r in rows}


def write_lines(path: Path, rows: list[Any]) -> None:
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json_text(row) + "\n" for row in rows).encode())


@dataclass(frozen=True)
class NamedJudge:
    """The judge that a command line names."""

    reward: Path | None
    reward_base: str | None
    endpoint: str | None
    judge_model: str | None
    cache: Path | None
    price: tuple[float, float]

    def open_reward(self) -> RewardJudge:
        """The reward model in the named folder, with its accuracy on held-out pairs where that was measured.

        Raises:
            ModelError: no reward model there, or none that names its base.
        """
        from keepset.judging.judge import RewardJudge
        from keepset.model.encode import Encoder
        from keepset.recipe import ModelSpec
        from keepset.train.reward import load_reward

        assert self.reward is not None
        config, base = self.reward / "adapter_config.json", self.reward_base
        if base is None:
            base = read_record(config).get("base_model_name_or_path") if config.exists() else str(self.reward)
        if not isinstance(base, str):
            raise ModelError(f"{config}: names no base model; give --reward_base")
        spec = ModelSpec(model_name_or_path=base)
        progress().print(f"judge: {self.reward} on {base}", highlight=False)
        model, tokenizer = load_reward(spec, self.reward)
        measured = self.reward / layout.REWARD_HELDOUT
        return RewardJudge(model, Encoder(tokenizer, spec), read_record(measured) if measured.exists() else None)

    def open_endpoint(self) -> HttpJudge:
        """The judge behind the named address.

        Raises:
            RecipeError: no judge was named.
        """
        from keepset.judging.endpoint import Endpoint
        from keepset.judging.judge import HttpJudge

        if not self.endpoint or not self.judge_model:
            raise RecipeError("name a judge: --reward FOLDER, or --endpoint URL with --judge_model NAME")
        return HttpJudge(Endpoint(self.endpoint, self.judge_model), cache=self.cache, price=self.price)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a training wrote.

    Raises:
        ModelError: it can't be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ModelError(f"{path}: not a JSON object; train the reward model again")
    return record
