"""What looks wrong with a scoring or a comparison: named findings, each with its figure and what to do about it.

The names are failure signatures: scores near zero, scores that follow length, repeats, a base loss near zero, a
reference that learnt nothing (or nothing that holds on other rows: `reference_check`), gradients that are mostly shared
momentum, leaks, sources and categories that vanish, a selection no better than Random or worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keepset.data import Pool, Target
from keepset.data.leakage import find_leaks
from keepset.evaluate.statistics import correlations
from keepset.pipeline.metrics import p_of, told
from keepset.row_ids import Ids
from keepset.runfolder import layout
from keepset.runfolder.records import Comparison, Finding, Level, read_json
from keepset.runfolder.shards import machines

if TYPE_CHECKING:
    from keepset.pipeline.choose import Subset
    from keepset.stages.job import Job

NEAR_ZERO_SCORE = 0.01  # median |DavIR| below this: the reference moved nothing
SKEWED_LENGTH = 2.0  # kept answers this many times longer, or shorter, than the pool's are told as a warning
STRONG_LENGTH = 0.5  # |Spearman| with length from here on is told as a warning
FOLLOWS_LENGTH = "hold the result against the `longest` control and read the length-matched figures"
FLEES_LENGTH = "hold the result against the shortest rows of its size: set `controls.shortest: true`"
NEAR_ZERO_LOSS = 0.05  # nats a token: DavIR divides by it
STORE_AGREES = (
    0.9  # Spearman of a gradient store's cosines with the exact ones, below which ranks are not to be trusted
)
MIXED = ("mixed-machines",)
COMPARED = ("no-better-than-random", "worse-than-random")
MOST_SHARES = 12  # sources or categories that a finding names
SWAMPED = 0.5  # median cosine of the mapped gradient with the momentum that all rows share


def diagnose_scores(table: pa.Table, label: str, *, folds: int = 0) -> list[Finding]:
    """Findings from one method's scores table.

    `folds` of a cross-fitted reference; 0: the reference was trained on the rows it scored.
    """
    scored = table if not table["score"].null_count else table.filter(pc.is_valid(table["score"]))
    if scored.num_rows < 3:
        return []
    score = scored["score"].to_numpy()
    n_tokens = scored["n_tokens"].to_numpy()
    findings: list[Finding] = []

    def add(name: str, level: Level, figure: float | None, text: str, advice: str) -> None:
        findings.append(Finding(name, level, label, None if figure is None else round(float(figure), 4), text, advice))

    if np.ptp(score) == 0:
        add("constant-scores", "warning", score[0], f"every row has the score {score[0]:g}",
            "the method has no signal here: check the target, the reference or the warm-up")  # fmt: skip
        return findings
    if np.ptp(n_tokens) > 0:
        link = correlations(score, n_tokens)
        level: Level = "warning" if abs(link.spearman) >= STRONG_LENGTH else "info"
        add("length-correlation", level, link.spearman,
            f"score and length: Spearman {link.spearman:+.2f}, Pearson {link.pearson:+.2f}",
            "no strong tie to length" if level == "info" else FOLLOWS_LENGTH if link.spearman > 0 else FLEES_LENGTH
        )  # fmt: skip
    if {"loss_ini", "loss_ref"} <= set(scored.column_names):
        findings += loss_findings(scored, label, n_tokens, folds)
    momentum = [name for name in scored.column_names if name.endswith(".momentum")]
    if momentum:
        share = float(np.median(np.abs(np.stack([scored[name].to_numpy() for name in momentum]))))
        add(
            "shared-momentum",
            "warning" if share >= SWAMPED else "info",
            share,
            f"median cosine of a row's mapped gradient with the momentum shared by all rows: {share:.2f}",
            "try `map: precondition`, which leaves the shared term out"
            if share >= SWAMPED
            else "the rows' own part leads",
        )
    stored = [scored[name].to_numpy() for name in scored.column_names if name.endswith(".store_spearman")]
    if stored and np.isfinite(stored).all():
        rank = float(np.min(stored))
        low = rank < STORE_AGREES
        add("store-agreement", "warning" if low else "info", rank,
            f"scores come from the store, not exactly: on a sample, Spearman {rank:.2f} with the exact ones",
            "raise gradients.store_dim, or leave gradients.store out for exact scores" if low else
            "close enough for ranks")  # fmt: skip
    repeats = count_repeats(scored["id"])
    if repeats:
        add("duplicates", "warning", repeats, f"{repeats} rows are exact copies of others and score alike",
            "set select.dedup: exact, or near")  # fmt: skip
    return findings


def count_repeats(ids: pa.ChunkedArray) -> int:
    """How many rows are copies of others, from their ids, each of which stands once."""
    numbered = ids.filter(pc.match_substring(ids, "-"))
    firsts = pa.array(sorted({i.split("-")[0] for i in numbered.to_pylist()}), pa.string())
    missing = len(firsts) - pc.sum(pc.is_in(ids, firsts)).as_py() if len(firsts) else 0  # one of its copies stands in
    return len(numbered) - missing


def loss_findings(scored: pa.Table, label: str, n_tokens: np.ndarray, folds: int) -> list[Finding]:
    """DavIR's own failure signatures."""
    from keepset.pipeline.reference_check import held_out_finding

    ini, ref = scored["loss_ini"].to_numpy(), scored["loss_ref"].to_numpy()
    usable = (ini > 0) & np.isfinite(ini) & np.isfinite(ref)  # rho has scores where DavIR has none
    ini, ref, n_tokens = ini[usable], ref[usable], n_tokens[usable]
    if len(ini) < 3:
        return []
    relative = (ini - ref) / ini
    findings: list[Finding] = []
    middle = float(np.median(np.abs(relative)))
    if middle < NEAR_ZERO_SCORE:
        findings.append(Finding("scores-near-zero", "warning", label, round(middle, 4),
            f"median |DavIR| is {middle:.4f}: the reference hardly differs from the base",
            "train the reference longer or with a larger learning rate"))  # fmt: skip
    small = int((ini / n_tokens < NEAR_ZERO_LOSS).sum())
    if small:
        findings.append(Finding("base-loss-near-zero", "warning", label, small,
            f"{small} rows have a base loss below {NEAR_ZERO_LOSS} nats a token, by which DavIR divides",
            "look at them: memorised or trivial answers; their scores are unstable"))  # fmt: skip
    if folds >= 2:
        where = f"the pool's rows, each scored by the reference that was not trained on it ({folds} folds),"
        findings.append(held_out_finding(ini, ref, n_tokens, where, label))
    else:
        drop = float((ini - ref).sum() / n_tokens.sum())
        learnt = drop > 0
        advice = ("in-sample: cross-fit with reference.folds to see what is memory" if learnt else
                  "the reference did not learn the pool: check its learning rate and epochs")  # fmt: skip
        findings.append(Finding("reference-gain", "info" if learnt else "warning", label, round(drop, 4),
            f"the reference lowers the pool's loss by {drop:.3f} nats a token", advice))  # fmt: skip
    if np.ptp(n_tokens) == 0 or np.ptp(relative) == 0:
        return findings
    plain, mean, normalised = (correlations(x, n_tokens) for x in (ini - ref, (ini - ref) / n_tokens, relative))
    weaker = abs(normalised.spearman) < abs(plain.spearman)
    findings.append(Finding("length-before-after", "info", label, round(plain.spearman, 4),
        f"length: summed drop (RHO) Spearman {plain.spearman:+.2f}, Pearson {plain.pearson:+.2f}; a token "
        f"{mean.spearman:+.2f}, {mean.pearson:+.2f}; normalised (DavIR) {normalised.spearman:+.2f}, "
        f"{normalised.pearson:+.2f}",
        "dividing by the base loss weakened the tie to length, as the paper claims" if weaker else
        "dividing by the base loss did not weaken the tie to length here, as the paper claims it does"))  # fmt: skip
    return findings


def diagnose_shares(table: pa.Table, label: str, chosen: Ids | np.ndarray | None = None) -> list[Finding]:
    """How each source's and category's share, and the mean length, changed by the selection.

    `chosen` (k,) are the subset's ids; default: the rows marked `selected`.
    """
    kept = table.filter(table["selected"] if chosen is None else pc.is_in(table["id"], pa.array(chosen, pa.string())))
    if not kept.num_rows:
        return []
    findings = []
    for column, plural in (("source", "sources"), ("category", "categories")):
        before, after = (counted(t[column]) for t in (table, kept))
        if len(before) < 2:
            continue
        shares = {name: (n / table.num_rows, after[name] / kept.num_rows) for name, n in before.most_common()}
        text = ", ".join(f"{name} {a:.0%} -> {b:.0%}" for name, (a, b) in list(shares.items())[:MOST_SHARES])
        more = f" and {len(shares) - MOST_SHARES} more" if len(shares) > MOST_SHARES else ""
        lost = [name for name, (_, b) in shares.items() if b == 0]
        level: Level = "warning" if lost else "info"
        advice = (f"none of {', '.join(lost[:3])} is left: " if lost else "") + "select.quota keeps shares, if wanted"
        findings.append(Finding(f"{column}-shares", level, label, round(max(b for _, b in shares.values()), 4),
                             f"{plural} before -> after: {text}{more}", advice))  # fmt: skip
    lengths = [float(np.mean(t["n_tokens"].to_numpy())) for t in (table, kept)]
    unit = (table.schema.metadata or {}).get(b"length_unit", b"tokens").decode()
    skewed = not 1 / SKEWED_LENGTH < lengths[1] / lengths[0] < SKEWED_LENGTH
    findings.append(Finding("kept-length", "warning" if skewed else "info", label, round(lengths[1], 2),
        f"mean answer before -> after: {lengths[0]:.1f} -> {lengths[1]:.1f} {unit}",
        "the choice is largely one of length: give the budget in tokens, and look at the rows" if skewed else
        "the choice keeps answers of about the pool's length"))  # fmt: skip
    return findings


def counted(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value stands in a column, in the order in which they first do."""
    entries = pc.value_counts(column).to_pylist()
    return Counter({"–" if one["values"] is None else one["values"]: one["counts"] for one in entries})


def diagnose_edge(subset: Subset) -> list[Finding]:
    """Rows that are in or out of a subset by less than the numbers can tell."""
    edge = subset.edge
    if edge is None or edge.gap is None:
        return []
    if not edge.chosen:
        return [Finding("stability", "info", subset.name, 0, "no chosen row is within numerical noise of one left out",
                        "another batch size or machine chooses the same rows")]  # fmt: skip
    first_ids = ", ".join(edge.chosen[:3]) + (", ..." if len(edge.chosen) > 3 else "")
    n = len(edge.chosen)
    share = f"{n} of {subset.n_rows} chosen rows {'is' if n == 1 else 'are'}"
    return [Finding("stability", "warning", subset.name, n,
        f"{share} within numerical noise of rows left out: {first_ids}",
        "another batch size or machine may exchange them; subsets.json names all")]  # fmt: skip


def diagnose_machines(folder: Path) -> list[Finding]:
    """Stages of a run folder whose shards were made with other devices, dtypes or libraries than one another."""
    findings = []
    for stage, made in machines(folder).items():
        if len(made) > 1:
            parts = "; ".join(f"{n} shards: {what}" for what, n in made.most_common())
            text = f"{stage.split('/')[0]}: shards were made with different machines or libraries: {parts}"
            findings.append(Finding("mixed-machines", "warning", stage, len(made), text,
                "scores of rows may differ by rounding that is not theirs: use one kind of device and one environment, "
                f"or delete work/{stage} and score again"))  # fmt: skip
    return findings


def diagnose_comparison(result: Comparison) -> list[Finding]:
    """Methods that Random of the same size matches on the headline, the first metric compared."""
    findings = []
    for entry in result.summary:
        if entry.kind != "method" or not entry.vs_random:
            continue
        metric, versus = next(iter(entry.vs_random.items()))
        verdict = told(metric, versus)
        if verdict == "better":
            continue
        text = (f"{metric}: {versus.difference:+.3f} against Random, 95 % interval {versus.low:+.3f} to "
                f"{versus.high:+.3f}, p {p_of(versus):.2g}: ")  # fmt: skip
        if verdict == "worse":
            name, verdict = "worse-than-random", "worse"
            advice = "this choice harms here: take Random, another method or another budget"
        else:
            name, verdict = "no-better-than-random", "not told apart"
            advice = "more held-out items, more seeds or a larger budget; or Random is enough here"
        findings.append(Finding(name, "warning", entry.label, round(versus.difference, 4), text + verdict, advice))
    return findings


def diagnose_leaks(pool: Pool, target: Target, what: str) -> list[Finding]:
    """Rows of the pool that the target, or the held-out pairs, already hold."""
    leaks = int((find_leaks(pool, target) != "").sum())
    if not leaks:
        return []
    text = f"{leaks} rows of the pool hold a prompt or answer of the {what}"
    return [Finding(f"{what}-in-pool", "warning", "", leaks, text,
                    "they score high, or are learnt, by identity: take them out of one of the two")]  # fmt: skip


def record(job: Job, findings: list[Finding], *, anew: Collection[str] = ()) -> None:
    """Print the warnings and store all findings, replacing older ones of the same name and method.

    Older findings named in `anew` all go: what they were about was looked at again.
    """
    old = read_json(tuple[Finding, ...], job.run.load_json(layout.FINDINGS, []), str(job.run.path / layout.FINDINGS))
    fresh = {(f.name, f.method) for f in findings}
    kept = [f for f in old if (f.name, f.method) not in fresh and f.name not in anew]
    job.run.save_json(layout.FINDINGS, [f.to_json() for f in (*kept, *findings)])
    for finding in findings:
        if finding.level == "warning":
            job.say(f"  ! {finding.method + ': ' if finding.method else ''}{finding.text}; {finding.advice}")
