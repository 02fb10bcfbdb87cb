"""The parts of `keepset.select`: ranking, budgets and quotas, duplicates, greedy diverse selection."""
