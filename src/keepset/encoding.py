"""`from keepset.encoding import Encoder`: the import path that scripts use; the code is in `keepset.model.encode`."""

from keepset.model.encode import Encoded, Encoder, RowRefused

__all__ = ["Encoded", "Encoder", "RowRefused"]
