"""Which models can be served: causal language models whose tokenizer fits them. Others end in one line."""

from __future__ import annotations

from typing import Any

from keepset.errors import ModelError

UNMASKED = "it predicts a token from those after it too; keepset scores causal language models (GPT, Llama, Qwen ...)"


def check_config(config: Any, source: str) -> None:
    """Refuse what is not a causal language model, as far as its config tells.

    Raises:
        ModelError: an encoder-decoder, a masked language model, a model of images or sound, a classifier.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = str(config.model_type)
    built_for = [str(name) for name in getattr(config, "architectures", None) or ()]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source}: {kind} is an encoder-decoder; keepset scores decoder-only language models")
    masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in built_for)
    if masked and not getattr(config, "is_decoder", False):
        raise ModelError(f"{source}: {built_for[0]} is a masked language model: {UNMASKED}")
    if any(name.endswith(("Classification", "Regression", "QuestionAnswering")) for name in built_for):
        raise ModelError(f"{source}: {built_for[0]} has no language-model head; name the model that it was made of")
    own = getattr(config, "auto_map", None) or {}
    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own:
        return
    if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or hasattr(config, "vision_config"):
        raise ModelError(
            f"{source}: {kind} is a vision-language model that transformers does not load as a causal language model; "
            "save its language model (model.language_model and the head) as a folder of its own"
        )
    raise ModelError(f"{source}: {kind} is not a causal language model, so it has no loss of a text")


def fit_tokenizer(tokenizer: Any, config: Any, source: str) -> None:
    """Note how many tokens the model has (`keepset_vocabulary`), by which rows with other ids are refused.

    A few added tokens beyond it do no harm until a row holds one (Gemma 3's `<image_soft_token>`).

    Raises:
        ModelError: the tokenizer's own vocabulary, its BOS or its EOS lies beyond the embedding.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    tokenizer.keepset_vocabulary = size
    if size is None:
        return
    own = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    own |= {i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None}
    beyond = [i for i in own if i >= size]
    if beyond:
        word = tokenizer.convert_ids_to_tokens(min(beyond))
        raise ModelError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {size}: {word!r} "
            f"({min(beyond)}) has no row; give the model its own tokenizer, or save it with resize_token_embeddings"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token  # never read, so any row of the embedding serves


def check_same_tokens(tokenizer: Any, other: Any, name: str) -> None:
    """Refuse a reference model to which the base's token ids mean other tokens.

    `other` None, an adapter without a tokenizer, is taken on trust; `name` is the reference's, for the message.

    Raises:
        ModelError: an id means two tokens, or is one that the reference lacks.
    """
    if other is None:
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    size, their_size = (getattr(t, "keepset_vocabulary", None) or len(t) for t in (tokenizer, other))
    wrong = sorted((i, token) for token, i in ours.items() if i < size and theirs.get(token) != i)
    if wrong:
        i, token = wrong[0]
        raise ModelError(
            f"{name}: another tokenizer than the scored model's: {len(wrong)} of {len(ours)} tokens have other ids "
            f"({token!r} is {i}, there {theirs.get(token)}); a reference must read the same tokens"
        )
    if their_size <= max(i for i in ours.values() if i < size):
        raise ModelError(
            f"{name}: its embedding has {their_size} tokens, the scored model's {size}; a reference must read the "
            "same tokens"
        )
