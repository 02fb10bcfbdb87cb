"""Where the loss drop of DavIR's best rows sits: the share of it at the end-of-turn token.

python experiments/davir-length/top_tokens.py runs/davir-length/alpaca 20
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from keepset.report.explain_tokens import tokens_of_rows
from keepset.runfolder.run import Run


def main() -> None:
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    table = Run(folder).load_table("scores/davir.parquet").sort_by([("rank", "ascending")])
    rows = list(tokens_of_rows(folder, table["id"].to_pylist()[:n]).values())
    drop = sum(row["before"] - row["after"] for row in rows)
    end = sum(row["tokens"][-1]["before"] - row["tokens"][-1]["after"] for row in rows)
    tokens = sum(len(row["tokens"]) for row in rows)
    result = {"rows": n, "tokens": tokens, "end_tokens": n, "drop_nats": round(drop, 2), "at_end_token": round(end, 2),
              "share_at_end_token": round(end / drop, 3)}  # fmt: skip
    out = Path(__file__).parent / "results" / f"top_tokens-{folder.name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
