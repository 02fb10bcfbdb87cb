"""Every causal architecture of the installed transformers, tiny and random, through keepset and through transformers.

`python tests/architectures.py [TYPE ...] [--out FILE]` builds each, saves it, loads it as a user would and compares
losses, hidden states and gradients with the checkpoint's own forward pass, one row at a time. Every architecture is
equal to 1e-4, or refused in one line, or could not be built; it exits with 1 where one is wrong or ends in a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "dim_model", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "global_head_dim", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_topk"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_layer_freq"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "swa_window_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("vocab_size", "n_words", "n_tokens", "vocab_size_per_layer_input"), 400),
    "hidden_size_per_layer_input": 8,
    "index_block_size": 8,
    "index_topk_blocks": 2,
}
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_decoder_layers", "num_encoder_layers"),
)

MLA = {"num_key_value_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"), MLA),
    **dict.fromkeys(("dots3_note_text",), MLA),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 32)},
}
"""What an architecture needs beside its sizes."""


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LONG = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 40.0], "original_max_position_embeddings": 24}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, LongRoPE": ("phi3", {**_rope("longrope", **LONG), "original_max_position_embeddings": 24}),
    "llama, LongRoPE": ("llama", _rope("longrope", factor=4.0, **LONG)),
    "llama, dynamic NTK": ("llama", _rope("dynamic", factor=2.0)),
    "llama, YaRN": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, windows above a layer": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16},
    ),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "minimax_m3_vl_text, sparse": (
        "minimax_m3_vl_text",
        {"layer_types": ["full_attention", "minimax_m3_sparse"], "num_hidden_layers": 2},
    ),
    "lfm2, convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid, both": ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    "opt, projections": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gemma2, caps that bite": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0}),
    "granite, multipliers": (
        "granite",
        {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.5},
    ),
    "cohere, scale": ("cohere", {"logit_scale": 7.0}),
}
"""Kinds of position, window and head that no architecture has by default."""


def names() -> list[str]:
    """Model types that `AutoModelForCausalLM` knows, in the alphabet's order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The type's default configuration with every size small and every kind of layer kept."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type](), {**OVERRIDES.get(model_type, {}), **changes})


def _shrunk(config: Any, changes: dict[str, Any]) -> Any:
    plain = config.to_dict()
    kinds = list(dict.fromkeys(plain.get("layer_types") or plain.get("layers_block_type") or ()))
    new: dict[str, Any] = {k: SIZES[k] for k, v in plain.items() if k in SIZES and type(v) is int}
    new |= {k: max(2, len(kinds)) for k, v in plain.items() if k in LAYERS and type(v) is int}
    special = [k for k, v in plain.items() if k.endswith(("_token_id", "_token_index")) and type(v) is int]
    new |= {key: 399 - n if plain[key] >= 3 else plain[key] for n, key in enumerate(special)}
    for key in ("layer_types", "layers_block_type"):
        if plain.get(key):
            new[key] = kinds if len(kinds) > 1 else kinds * 2
    if plain.get("is_decoder") is False:
        new["is_decoder"] = True  # BERT and its kin are causal only so
    if "initializer_range" in plain:
        new["initializer_range"] = 0.2
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if sub is not None:
            new[key] = _shrunk(sub, {}).to_dict()
    return type(config)(**(new | changes))


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model whose every parameter counts: norms are not 1, biases, sinks and gates not 0."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.05))
    return model


@dataclass(frozen=True)
class Row:
    """A row of random tokens, supervised after its prompt."""

    input_ids: np.ndarray
    supervised: np.ndarray


def random_rows(vocabulary: int, seed: int, n: int = 10) -> list[Row]:
    """Rows of 4 to 44 tokens, some beyond the windows of `SIZES`; four share a beginning."""
    rng = np.random.default_rng(seed)
    common = rng.integers(5, vocabulary - 40, 11)
    rows = []
    for i in range(n):
        ids = rng.integers(5, vocabulary - 40, int(rng.integers(4, 45)))
        ids = np.concatenate([common, ids]) if i < 5 else ids
        rows.append(Row(ids.astype(np.int32), np.arange(len(ids)) >= (len(common) if i < 5 else len(ids) // 3 + 1)))
    return rows


def own_losses(model: Any, rows: list[Row]) -> list[np.ndarray]:
    """Losses of the supervised tokens in nats by the model's own forward pass, a row at a time."""
    import torch

    out = []
    for row in rows:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        nll = -logits.gather(1, ids[0, 1:, None])[:, 0]
        out.append(nll.numpy()[row.supervised[1:]])
    return out


def own_states(model: Any, decoder: str, rows: list[Row]) -> np.ndarray:
    """Each row's last final hidden state (n, d), a row at a time."""
    import torch

    out = []
    for row in rows:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            out.append(model.get_submodule(decoder)(input_ids=ids, use_cache=False).last_hidden_state[0, -1].numpy())
    return np.stack(out)


def own_gradients(peft: Any, rows: list[Row]) -> list[Any]:
    """Each row's flat gradient of the mean token loss with respect to the LoRA, by autograd, a row at a time."""
    import torch

    lora = [p for n, p in peft.named_parameters() if "lora_" in n]
    out = []
    for row in rows:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        logits = peft.get_base_model()(input_ids=ids, use_cache=False).logits[0, :-1].float()
        keep = torch.as_tensor(row.supervised[1:])
        loss = torch.nn.functional.cross_entropy(logits[keep], ids[0, 1:][keep])
        grads = torch.autograd.grad(loss, lora, allow_unused=True, materialize_grads=True)
        out.append(torch.cat([g.flatten() for g in grads]))
    return out


def engine_gradients(peft: Any, rows: list[Row]) -> list[Any]:
    """The same from keepset's engine."""
    import torch

    from keepset.features.row_gradients import each_gradient

    found: dict[str, dict[int, Any]] = {}

    def visit(name: str, indices: np.ndarray, gradients: Any) -> None:
        for i, gradient in zip(indices, gradients, strict=True):
            found.setdefault(name, {})[int(i)] = gradient.flatten().clone()

    each_gradient(peft, rows, visit, token_budget=256)
    names = [n for n, _ in peft.named_parameters() if "lora_" in n]
    return [torch.cat([found[n][i] for n in names]) for i in range(len(rows))]


def relative(got: Any, want: Any) -> float:
    """Largest difference over 1 + magnitude; infinite for NaN."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    worst = float((np.abs(got - want) / (1 + np.abs(want))).max())
    return worst if np.isfinite(worst) else float("inf")


@dataclass
class Outcome:
    """What came out for one architecture; errors are relative, None where nothing could be compared."""

    model_type: str
    status: str = "equal"
    how: str = ""
    losses: float | None = None
    states: float | None = None
    gradients: float | None = None
    note: str = ""
    trace: str = field(default="", repr=False)


def sweep(name: str, tokenizer: Any) -> Outcome:
    """Build, save, load and compare one architecture or variant."""
    import torch
    from transformers import AutoModelForCausalLM

    from keepset.errors import ModelError
    from keepset.features.losses import row_losses
    from keepset.features.representations import representations
    from keepset.model.load import apply_lora, load
    from keepset.model.pack import engine
    from keepset.recipe import LoraSpec, ModelSpec

    model_type, changes = VARIANTS.get(name, (name, {}))
    out = Outcome(name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            built = tiny_model(model_type, **changes)
            with torch.no_grad():
                built(input_ids=torch.arange(5, 15)[None], use_cache=False)
            built.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:  # what transformers itself can't do
            return Outcome(name, "not built", note=_line(error))
        vocabulary = int(truth.get_input_embeddings().weight.shape[0])
        rows = random_rows(min(vocabulary, 400), seed=11)
        try:
            loaded = load(ModelSpec(model_name_or_path=folder, device="cpu"))
            model, how = loaded.model, engine(loaded.model)
            out.how = ("packed" if how.packed else "alone" if how.apart == 0 else "padded") + (
                ", own head" if how.head == "own" else ""
            )
            got = row_losses(model, rows, token_budget=256, per_token=True)
            out.losses = relative(np.concatenate(got.token_nll[0]), np.concatenate(own_losses(truth, rows)))
            states = own_states(truth, how.decoder, rows)
            size = float(np.sqrt((states**2).mean()))
            found = representations(model, rows, token_budget=256, pooling="last")
            out.states = relative(found / size, states / size)
            try:
                peft = apply_lora(model, LoraSpec(lora_r=2), 0)
            except ModelError as error:
                try:
                    peft = apply_lora(model, LoraSpec(lora_r=2, lora_target_modules="all-linear"), 0)
                except (ModelError, ValueError):
                    out.note = _line(error)
                    peft = None
            if peft is not None:
                with torch.no_grad():
                    for name, parameter in peft.named_parameters():
                        if "lora_B" in name:
                            parameter.normal_(0, 0.05)
                try:
                    grads = engine_gradients(peft.eval(), rows)
                except ModelError as error:
                    out.note = _line(error)
                else:
                    want = own_gradients(peft, rows)
                    errors = [float((g - w).norm() / w.norm()) for g, w in zip(grads, want, strict=True)]
                    out.gradients = max(errors)
        except ModelError as error:
            return Outcome(name, "refused", out.how, note=_line(error).replace(folder, "MODEL"))
        except Exception:  # the one thing that must not happen
            return Outcome(name, "traceback", trace=traceback.format_exc())
    if max(x for x in (out.losses, out.states, out.gradients, 0.0) if x is not None) > 1e-4:
        out.status = "WRONG"
    return out


def _line(error: BaseException) -> str:
    """Its first line, for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].replace("|", "/")[:160]


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row an architecture."""

    def number(x: float | None) -> str:
        return "–" if x is None else f"{x:.0e}"

    rows = [("model type", "outcome", "rows run", "losses", "hidden states", "gradients", "note"), ("---",) * 7]
    for o in outcomes:
        rows.append((o.model_type, o.status, o.how, *map(number, (o.losses, o.states, o.gradients)), o.note))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    """Run the sweep and print the table and the counts."""
    import torch
    import transformers
    from transformers.utils import logging as hf_logging

    from conftest import tiny_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer, outcomes = tiny_tokenizer(), []
    for name in options.types or [*names(), *VARIANTS]:
        outcomes.append(sweep(name, tokenizer))
        print(outcomes[-1], flush=True)
        if outcomes[-1].trace:
            print(outcomes[-1].trace, flush=True)
    counts = Counter(o.status for o in outcomes)
    graded = sum(o.gradients is not None for o in outcomes if o.status == "equal")
    summary = (
        f"transformers {transformers.__version__}, {len(outcomes)} architectures and variants: equal {counts['equal']} "
        f"(gradients too: {graded}), refused {counts['refused']}, could not be built {counts['not built']}, "
        f"silently wrong {counts['WRONG']}, tracebacks {counts['traceback']}"
    )
    text = table(outcomes)
    print(text + "\n" + summary)
    if options.out:
        head = options.out.read_text(encoding="utf-8").split("<!-- table -->")[0] if options.out.exists() else ""
        options.out.write_text(f"{head}<!-- table -->\n{summary}.\n\n{text}", encoding="utf-8")
    return 1 if counts["WRONG"] or counts["traceback"] else 0


if __name__ == "__main__":
    sys.exit(main())
