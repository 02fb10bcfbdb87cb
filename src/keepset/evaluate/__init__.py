"""Evaluation, one file each: preference pairs, held-out loss, GSM8K, rewards; the statistics they share."""
