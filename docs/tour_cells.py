# The tour's source: `python docs/make_tour.py` runs it into tour.ipynb and tour.md.

# %% [markdown]
# # A tour
#
# From a file of rows to a choice you can explain, with the small model and data that ship. A minute or two on two cores.

# %%
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from keepset import load_pool
from keepset.pipeline import run_recipe
from keepset.recipe import parse_recipe

demo = files("keepset") / "demo"
pool = load_pool(str(demo / "pool.jsonl"))
print(
    pool.n_in, "rows in =", len(pool), "usable +", len(pool.quarantine), "quarantined,", pool.duplicates, "exact copies"
)
for bad in pool.quarantine:
    print(f"line {bad.line}: {bad.reason}: {bad.detail}")
pool.messages(0)

# %% [markdown]
# ## Score and select
#
# A recipe is a mapping (or a YAML file). BM25 looks at the target's words; DavIR fine-tunes a reference on the pool and asks
# how much of each row's loss that removed. No evaluation is named here, so nothing else is trained.

# %%
recipe = parse_recipe(
    {
        "run_dir": "tour",
        "model": {"model_name_or_path": "demo", "chat_template": str(demo / "chatml.jinja"), "max_length": 256},
        "pool": {"path": str(demo / "pool.jsonl"), "limit": 30, "category_column": "task"},
        "target": str(demo / "target.jsonl"),
        "methods": ["davir", "bm25"],
        "budget": "20%",
        "reference": {"num_train_epochs": 1, "learning_rate": 2e-4},
        "controls": {"random_seeds": [0], "longest": True},
    }
)
job = run_recipe(recipe, console=Console(quiet=True))

# %% [markdown]
# ## Look at the scores
#
# Every row's score, rank and parts stand in one Parquet file a method.

# %%
import pyarrow.parquet as pq

scores = pq.read_table("tour/scores/davir.parquet").to_pandas().sort_values("rank")
scores[["rank", "score", "selected", "category", "n_tokens", "loss_ini", "loss_ref"]].head(5).round(3)

# %% [markdown]
# Does it only follow length? Do the two methods agree?

# %%
from keepset.evaluate.statistics import spearman

bm25 = pq.read_table("tour/scores/bm25.parquet").to_pandas().set_index("id")
davir = scores.set_index("id")
print("davir and length:", round(spearman(davir["score"], davir["n_tokens"]), 2))
print("davir and bm25:  ", round(spearman(davir["score"], bm25["score"].reindex(davir.index)), 2))
both = davir["selected"] & bm25["selected"].reindex(davir.index)
print("kept by both:", int(both.sum()), "of", int(davir["selected"].sum()))

# %%
from IPython.display import Image

from keepset.report.plot import write_plots

write_plots("tour", formats=["png"], only=["scores", "losses"])
Image("tour/plots/losses-davir.png", width=420)

# %% [markdown]
# ## Ask about one row
#
# Why was the best row kept, and which of its tokens did the reference learn?

# %%
from keepset.report.explain import explain
from keepset.report.explain_tokens import token_changes

best = scores["id"].iloc[0]
facts = explain(Path("tour"), best, "davir")
print(facts["verdict"])
print(facts["change"])
changes = token_changes(Path("tour"), best)
for token in sorted(changes["tokens"], key=lambda t: t["after"] - t["before"])[:5]:
    print(f"{token['text']!r:14} {token['before']:.2f} -> {token['after']:.2f} nats")

# %% [markdown]
# ## Hand it over
#
# The run folder is a dataset that `load_dataset("tour")` opens, and holds ready trainer configs and a report to open.

# %%
for path in sorted(Path("tour").glob("*")) + sorted(Path("tour/trainers").glob("*.yaml")):
    print(path)
