"""A stage of any function, computed as runs compute theirs: shards that an executor is handed."""

from __future__ import annotations

from keepset.runfolder.execute import Forks, Here, Task
from keepset.runfolder.run import Run


def sweep(folder, stages, ids, compute, *, shard_rows=None, workers=1, spent=lambda i, m: None, advance=lambda n: None):
    """Columns of each stage (name -> key) over all rows; `compute(indices, missing names)` makes what is missing."""
    shards = Run(folder).shards(stages, ids, shard_rows)
    lacking = {n: shards.missing(n) for n in range(len(shards.parts))}

    def make(argument, numbers):
        for number in numbers:
            missing = shards.missing(number)
            shards.write(number, compute(shards.parts[number], missing))

    def committed(number):
        spent(shards.parts[number], lacking[number])
        advance(len(shards.parts[number]))

    numbers = [n for n, names in lacking.items() if names]
    executor = Here() if workers == 1 else Forks(workers)
    executor.run(Task(make, None), numbers, is_there=lambda n: not shards.missing(n), advance=committed)
    return shards.gather()
