"""The parts of `keepset.selection.select`: ranking, budgets and quotas, duplicates, greedy diverse selection."""
