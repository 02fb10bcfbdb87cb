"""Ids in 16 bytes a row against arrays of strings."""

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from keepset.row_ids import Ids, id_order, order_by, same_ids

DIGESTS = st.lists(
    st.builds(lambda a, b: bytes([a]) * 8 + bytes([b]) * 8, st.sampled_from([0, 1, 255]), st.sampled_from([0, 7, 255])),
    max_size=40,
)


def spelt(digests: list[bytes]) -> list[str]:
    seen: dict[bytes, int] = {}
    out = []
    for digest in digests:
        out.append(digest.hex() + (f"-{seen[digest]}" if digest in seen else ""))
        seen[digest] = seen.get(digest, 0) + 1
    return out


@given(DIGESTS, st.randoms(use_true_random=False))
def test_ids_are_the_strings_they_stand_for(digests: list[bytes], shuffle: Any) -> None:
    names = spelt(digests)
    ids, copies = Ids.numbered(b"".join(digests))
    assert copies == len(digests) - len(set(digests))
    assert list(ids) == ids.tolist() == names == [ids[k] for k in range(len(names))] and len(ids) == len(names)
    assert pa.table({"id": ids})["id"].to_pylist() == names and ids.astype(str).tolist() == names
    picks = shuffle.choices(range(len(names)), k=5) if names else []
    assert ids[picks].tolist() == [names[k] for k in picks] and same_ids(ids[picks], ids[picks])
    assert ids.places(names).tolist() == list(range(len(names)))
    assert ids.places(["", "x", "0" * 31, "00" * 16 + "-77", "AB" * 16, "ab" * 16 + "-0"]).tolist() == [-1] * 6


@given(DIGESTS, st.integers(0, 3))
def test_orders_are_those_of_the_strings(digests: list[bytes], seed: int) -> None:
    ids, _ = Ids.numbered(b"".join(digests * 6))  # copies from -1 to -12 and more, where -10 stands before -2
    names = np.array(ids.tolist(), dtype=np.str_)
    assert ids.order.tolist() == id_order(names).tolist() == np.argsort(names, kind="stable").tolist()
    keys = np.random.default_rng(seed).integers(0, 3, len(names)).astype(float)
    assert order_by(keys, ids).tolist() == order_by(keys, names).tolist() == np.lexsort((names, keys)).tolist()
    assert same_ids(ids, names) and (not len(names) or not same_ids(ids, ids[:-1]))
