"""Scoring methods: one paper a file, NumPy in, NumPy out, larger = better. `methods.table.METHODS` lists them."""
