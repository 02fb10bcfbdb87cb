"""Evaluation, one file each: preference pairs, held-out loss, GSM8K, win rates, judges; the statistics they share."""
