"""What lies on disk and who computes it: the run folder, its shards, costs and workers."""
