"""Texts to vectors by an encoder of its own, such as a sentence embedding model: another thing for RDS to compare.

    h(z) = (1/T) Σ_t h_t     the mean of the last hidden states over the text's tokens, padding left out

That is the pooling of most sentence-transformers models (all-MiniLM, E5, GTE ...); one trained with another pooling,
or with a prefix before each text, gives other vectors than its authors'. Any model that `AutoModel` loads from
safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepset.errors import ModelError
from keepset.model.load import one_line
from keepset.model.weights import read

MOST_TOKENS = 512


class TextEncoder:
    """An encoder and its tokenizer, on the CPU or `device`, in float32."""

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        """Load it.

        No code from the repository `name` is run. Device `meta`: no weights are read, to count what it would cost.

        Raises:
            ModelError: it can't be loaded.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        if name.startswith((".", "/", "~")) and not (Path(name).expanduser() / "config.json").is_file():
            raise ModelError(f"embedding_model {name}: no such model folder")
        path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
        with one_line(f"embedding_model {name}"):
            if AutoConfig.from_pretrained(path).is_encoder_decoder:
                raise ModelError(f"embedding_model {name}: an encoder-decoder; name a model that is an encoder alone")
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            if str(device) == "meta":
                with torch.device("meta"):
                    self.model: Any = AutoModel.from_config(AutoConfig.from_pretrained(path))
            else:
                # The pooler stands after the states that are read; a head is another task's.
                self.model = read(AutoModel, path, drawn=r"(^|\.)pooler\.", spare=head_of_another_task,
                                  use_safetensors=True, dtype=torch.float32)  # fmt: skip
        self.model.to(device).eval()
        self.device = torch.device(device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or MOST_TOKENS
        # two fewer: RoBERTa-like models number positions from 2
        self.most = max(8, min(MOST_TOKENS, int(positions) - 2))

    def __call__(self, texts: Sequence[str], *, token_budget: int = 1024) -> np.ndarray:
        """Return (n, d) float32 in the order of `texts`; what is over 512 tokens (or the model's most) is cut."""
        ids = self.tokens(texts)
        out = np.zeros((len(texts), int(self.model.config.hidden_size)), dtype=np.float32)
        order = np.argsort([len(i) for i in ids], kind="stable")
        start = 0
        with torch.inference_mode():
            while start < len(order):
                stop = start + 1  # rows of like length, the longest times their number within the budget
                while stop < len(order) and len(ids[order[stop]]) * (stop + 1 - start) <= token_budget:
                    stop += 1
                chunk = order[start:stop]
                out[chunk] = self.means([ids[i] for i in chunk])
                start = stop
        return out

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to the most that the model takes."""
        return [self.tokenizer(t, truncation=True, max_length=self.most)["input_ids"] or [self.blank] for t in texts]

    def cost(self, texts: Sequence[str]) -> tuple[int, float]:
        """Tokens of the texts, and operations of a forward pass over them (see `keepset.model.flops`)."""
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        weights = sum(p.numel() for p in self.model.parameters() if p.ndim == 2 and id(p) not in tables)
        n_tokens = sum(len(self.tokens([text])[0]) for text in texts)
        return n_tokens, 2.0 * weights * n_tokens

    @property
    def blank(self) -> int:
        """The token that stands for an empty text."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in candidates if i is not None)

    def means(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Mean state of each row, padded on the right and masked."""
        longest = max(len(i) for i in ids)
        padded = torch.full((len(ids), longest), self.blank, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for k, row in enumerate(ids):
            padded[k, : len(row)] = torch.as_tensor(row)
            mask[k, : len(row)] = 1
        states = self.model(input_ids=padded.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        weights = mask.to(self.device)[..., None].float()
        return ((states.float() * weights).sum(1) / weights.sum(1)).cpu().numpy()


def head_of_another_task(model: Any, tensor: str) -> bool:
    """Whether a tensor of a checkpoint stands under no module of the encoder, as a masked LM's head does."""
    return tensor.removeprefix(f"{model.base_model_prefix}.").split(".")[0] not in dict(model.named_children())
