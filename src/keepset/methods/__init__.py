"""Scoring methods: one paper a file, NumPy in, NumPy out, larger = better. `keepset.scoring.METHODS` lists them."""
