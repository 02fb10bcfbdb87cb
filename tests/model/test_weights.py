"""Weights are read whole or not at all; an adapter too; tokenizers fit; what is no causal LM is told so."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from conftest import random_rows, save_tiny, tiny_lora, tiny_model, tiny_tokenizer  # noqa: E402
from keepset.errors import ModelError  # noqa: E402
from keepset.features.embeddings import TextEncoder  # noqa: E402
from keepset.features.losses import row_losses  # noqa: E402
from keepset.model.encode import Encoder, RowRefused, encode_all  # noqa: E402
from keepset.model.kind import check_same_tokens  # noqa: E402
from keepset.model.load import apply_lora, load, load_adapter, load_tokenizer  # noqa: E402
from keepset.model.weights import fingerprint  # noqa: E402
from keepset.recipe import LoraSpec, ModelSpec  # noqa: E402
from keepset.stages.losses import weights_of  # noqa: E402
from keepset.train.reward import load_reward, reward_model  # noqa: E402

Tensors = dict[str, Any]
DOWN = "model.layers.1.mlp.down_proj.weight"


def save(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    save_tiny(path, architecture, **changes)
    return path


def edit(path: Path, change: Callable[[Tensors], Any], name: str = "model.safetensors") -> None:
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, {"format": "pt"})


def configure(path: Path, name: str = "config.json", **changes: Any) -> None:
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | changes))


def spec(path: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(model_name_or_path=str(path), **changes)


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(ModelError) as error:
        load(spec(path, **changes))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (lambda d: d.pop(DOWN), {}, f"lacks 1 tensor ({DOWN})"),
        (lambda d: d.pop("lm_head.weight"), {}, "tie_word_embeddings"),
        (lambda d: d.update({"model.layers.0.mlp.extra": torch.ones(2)}), {}, "(model.layers.0.mlp.extra) that"),
        (lambda d: None, {"num_hidden_layers": 1}, "holds 9 tensors (model.layers.1.input_layernorm.weight, "),
        (lambda d: None, {"num_hidden_layers": 11}, "lacks 81 tensors (model.layers.2.input_layernorm.weight, "),
        (lambda d: None, {"intermediate_size": 48}, "down_proj.weight: (32, 64) for (32, 48), "),
        (lambda d: None, {"vocab_size": 400}, "model.embed_tokens.weight: (320, 32) for (400, 32)"),
        (lambda d: None, {"model_type": "gpt_neox"}, "lacks "),
        (lambda d: d.update({DOWN: d[DOWN].to(torch.float8_e4m3fn), f"{DOWN}_scale_inv": torch.ones(2, 4)}), {}, DOWN),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_the_configs_is_refused_by_name(
    tmp_path: Path, tensors: Callable[[Tensors], Any], config: dict[str, Any], words: str
) -> None:
    save(tmp_path, tie_word_embeddings=False)
    edit(tmp_path, tensors)
    configure(tmp_path, **config)
    assert words in refusal(tmp_path)


def test_a_tied_model_that_lacks_both_ends_is_refused_and_one_that_has_two_keeps_both(tmp_path: Path) -> None:
    save(tmp_path / "none")
    edit(tmp_path / "none", lambda d: d.pop("model.embed_tokens.weight"))
    assert "lm_head.weight, model.embed_tokens.weight" in refusal(tmp_path / "none")
    save(tmp_path / "two", tie_word_embeddings=False)
    configure(tmp_path / "two", tie_word_embeddings=True)
    rows = random_rows(3)
    want = row_losses(tiny_model("llama", tie_word_embeddings=False), rows, token_budget=100).nll
    np.testing.assert_allclose(row_losses(load(spec(tmp_path / "two")).model, rows, token_budget=100).nll, want)


def test_left_over_constants_of_older_versions_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path)
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                 "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}  # fmt: skip
    edit(tmp_path, lambda d: d.update(constants))
    load(spec(tmp_path))


def test_shards(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    load(spec(tmp_path))
    second = sorted(tmp_path.glob("model-*"))[1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    assert "get it again" in refusal(tmp_path)
    second.unlink()
    assert second.name in refusal(tmp_path)
    configure(tmp_path, "model.safetensors.index.json",
              weight_map={k: v for k, v in index["weight_map"].items() if v != second.name})  # fmt: skip
    assert "lacks " in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "get the whole model again" in refusal(tmp_path)


def test_a_missing_expert_is_named_however_quiet_transformers_is(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers import logging as theirs

    config = MixtralConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load(spec(tmp_path))
    edit(tmp_path, lambda d: d.pop(next(k for k in sorted(d, reverse=True) if ".experts.3.w3" in k)))
    shown = theirs.get_verbosity()
    for level in (logging.ERROR, logging.WARNING):
        theirs.set_verbosity(level)
        assert "model.layers.1.mlp.experts.gate_up_proj" in refusal(tmp_path)
        assert logging.getLogger("transformers.modeling_utils").filters == []
    theirs.set_verbosity(shown)


def test_fp8_weights_are_dequantised_to_one_dtype_and_a_missing_scale_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    want: Tensors = {}

    def quantise(d: Tensors) -> None:
        for name, w in list(d.items()):
            if "_proj" in name:
                scale = torch.rand(w.shape[0] // 16, w.shape[1] // 16) + 0.5
                blocks = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
                d[name], d[f"{name}_scale_inv"] = (w / blocks).to(torch.float8_e4m3fn), scale
                want[name] = d[name].float() * blocks
            else:
                d[name] = w.bfloat16()
                want[name] = d[name].float()

    edit(tmp_path, quantise)
    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    configure(tmp_path, quantization_config=fp8)
    got = load(spec(tmp_path, device="cpu")).model.state_dict()
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert all(torch.equal(got[name], w) for name, w in want.items())
    edit(tmp_path, lambda d: d.pop(f"{DOWN}_scale_inv"))
    assert f"1 tensor ({DOWN}) of 8 bits without a scale" in refusal(tmp_path, device="cpu")


def test_an_adapter_beside_merged_weights_is_said_and_not_put_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = tiny_lora(tiny_model("llama"))
    peft.save_pretrained(tmp_path / "adapter")
    rows = random_rows(3)
    want = row_losses(peft, rows, token_budget=100).nll
    merged = tmp_path / "merged"
    peft.merge_and_unload().save_pretrained(merged)
    tiny_tokenizer().save_pretrained(merged)
    alone = load(spec(merged)).fingerprint
    assert "adapter_config.json" not in caplog.text
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, merged)
    loaded = load(spec(merged))
    assert "adapter_config.json" in caplog.text and loaded.fingerprint == alone
    np.testing.assert_allclose(row_losses(loaded.model, rows, token_budget=100).nll, want, rtol=1e-5)
    assert any("lora_A" in name for name, _ in apply_lora(loaded.model, LoraSpec(), 0).named_parameters())
    (merged / "model.safetensors").unlink()
    assert "an adapter, not a model" in refusal(merged)


@pytest.mark.parametrize(
    ("made", "change", "words"),
    [
        ({}, lambda d: d.pop(sorted(d)[0]), "lacks 1 tensor (base_model.model.model.layers.0.self_attn.k_proj.lora_A"),
        ({}, lambda d: d.update(x=torch.ones(1)), "1 tensor (x) that the model has no place for"),
        ({"num_hidden_layers": 1}, lambda d: None, "lacks 8 tensors"),
        ({"num_hidden_layers": 3}, lambda d: None, "8 tensors (base_model.model.model.layers.2."),
        ({}, lambda d: d.update({k: v[:2].clone() for k, v in d.items() if "lora_A" in k}), "(2, 32) for (4, 32)"),
        ({}, lambda d: d.update({"base_model.model.model.embed_tokens.weight": torch.ones(330, 32)}), "(330, 32)"),
        ({}, lambda d: d.update({"base_model.model.model.norm.weight": torch.zeros(32)}), "another model.norm.weight"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, made: dict[str, Any], change: Callable[[Tensors], Any], words: str
) -> None:
    tiny_lora(tiny_model("llama", **made)).save_pretrained(tmp_path)
    edit(tmp_path, change, "adapter_model.safetensors")
    base = tiny_model("llama")
    before = {name: w.clone() for name, w in base.state_dict().items()}
    with pytest.raises(ModelError) as error:
        load_adapter(base, tmp_path, trainable=True)
    assert words in str(error.value) and "\n" not in str(error.value)
    after = {name.replace(".base_layer", ""): w for name, w in base.state_dict().items()}
    assert all(torch.equal(after[name], w) for name, w in before.items())


def test_an_adapter_with_a_whole_module_is_read_and_one_without_it_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        peft.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    peft.save_pretrained(tmp_path)
    x = torch.arange(8)[None]
    assert torch.equal(load_adapter(tiny_model("llama"), tmp_path)(x).logits, peft.eval()(x).logits)
    edit(tmp_path, lambda d: d.pop("base_model.model.lm_head.weight"), "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lacks base_model\.model\.lm_head\.weight"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_an_adapter_of_virtual_tokens_is_refused(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="PROMPT_TUNING does more than change weights"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_what_an_adapter_is_made_of_counts_its_scale_and_not_its_bases_folder(tmp_path: Path) -> None:
    tiny_lora(tiny_model("llama")).save_pretrained(tmp_path)
    before = weights_of(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    configure(tmp_path, "adapter_config.json", base_model_name_or_path="/elsewhere", target_modules=targets[::-1])
    assert weights_of(tmp_path) == before
    configure(tmp_path, "adapter_config.json", lora_alpha=1)
    assert weights_of(tmp_path) != before


def test_a_hub_models_fingerprint_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.hub as theirs

    seen: list[Any] = []

    def cached_file(name: str, file: str, revision: str | None = None) -> str:
        seen.append((name, file, revision))
        return f"/cache/models--a--b/snapshots/{'0' * 39}{len(seen)}/config.json"

    monkeypatch.setattr(theirs, "cached_file", cached_file)
    first, second = fingerprint("a/b"), fingerprint("a/b", "v2")
    assert first == f"a/b@{'0' * 39}1" and second == f"a/b@{'0' * 39}2"
    assert seen == [("a/b", "config.json", None), ("a/b", "config.json", "v2")]


def test_a_folders_own_code_counts_when_it_is_run(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "modeling.py").write_text("1")
    before = fingerprint(str(tmp_path)), fingerprint(str(tmp_path), code=True)
    (tmp_path / "modeling.py").write_text("2")
    assert fingerprint(str(tmp_path)) == before[0] and fingerprint(str(tmp_path), code=True) != before[1]


def row(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]


def test_a_row_with_a_token_beyond_the_embedding_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    save(tmp_path)
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens([f"<more{i}>" for i in range(400)])
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(load_tokenizer(spec(tmp_path)), spec(tmp_path))
    inside, beyond = f"<more{319 - size}>", f"<more{320 - size}>"
    rows, refused = encode_all(encoder, [row("yes"), row(f"a {beyond}"), row(f"a {inside}")])
    assert [r is not None for r in rows] == [True, False, True]
    why = f"'{beyond}' is token 320 of the tokenizer's {size + 400}; the embedding has 320"
    assert refused == [(1, "token-beyond-embedding", why)]
    with pytest.raises(RowRefused):
        encoder.encode(row(beyond))
    tokenizer.chat_template = (tokenizer.chat_template or "") + beyond
    tokenizer.save_pretrained(tmp_path)
    assert "the embedding has 320" in str(pytest.raises(ModelError, load, spec(tmp_path)).value)


def test_a_vocabulary_or_an_end_beyond_the_embedding_is_refused_with_both_sizes(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=200)
    n = len(tiny_tokenizer())
    assert f"the tokenizer has {n} tokens, the model's embedding 200" in refusal(tmp_path)
    save(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<more{i}>" for i in range(50)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert load(spec(tmp_path)).tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    assert "'<end>'" in refusal(tmp_path)


def test_a_reference_must_read_the_same_tokens(tmp_path: Path) -> None:
    ours = load_tokenizer(spec(save(tmp_path / "a")))
    bigger = load_tokenizer(spec(save(tmp_path / "b", vocab_size=400)))
    check_same_tokens(ours, bigger, "b")  # an embedding that is padded further up
    text = (tmp_path / "b" / "tokenizer.json").read_text()
    other = json.loads(text)
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match=r"2 of \d+ tokens have other ids"):
        check_same_tokens(ours, load_tokenizer(spec(tmp_path / "b")), "b")
    bigger.keepset_vocabulary = 100
    with pytest.raises(ModelError, match="its embedding has 100 tokens, the scored model's 320"):
        check_same_tokens(ours, bigger, "b")


SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "config", "words"),
    [
        ("bert", "BertForMaskedLM", SMALL, "masked language model"),
        ("bert", "BertLMHeadModel", SMALL, "not causal"),
        ("bert", "BertForSequenceClassification", SMALL, "no language-model head"),
        ("distilbert", "DistilBertModel", {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}, "not a causal"),
        ("xlnet", "XLNetLMHeadModel", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}, "not causal"),
        ("t5", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
         "encoder-decoder"),
        ("llama", "LlamaForSequenceClassification", {**SMALL, "pad_token_id": 0}, "no language-model head"),
    ],
)  # fmt: skip
def test_what_is_not_a_causal_language_model_is_told_so(
    tmp_path: Path, kind: str, name: str, config: dict[str, Any], words: str
) -> None:
    import transformers

    made = transformers.AutoConfig.for_model(kind, **{"vocab_size": 320, **config})
    torch.manual_seed(0)
    getattr(transformers, name)(made).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert words in refusal(tmp_path)


def test_a_bert_that_was_made_a_decoder_is_causal(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load(spec(tmp_path))


def test_an_image_model_or_an_unknown_architecture_is_told_so(tmp_path: Path) -> None:
    save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    text = json.loads(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert "vision-language model" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(config)
    configure(tmp_path, model_type="nobodys")
    assert "upgrade transformers" in refusal(tmp_path)
    configure(tmp_path, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    assert "trust_remote_code: true and pin model_revision" in refusal(tmp_path)


def test_an_encoder_may_hold_another_tasks_head_and_lack_a_pooler_but_no_layer(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert TextEncoder(str(tmp_path))(["hi"]).shape == (1, 32)
    configure(tmp_path, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\."):
        TextEncoder(str(tmp_path))
    configure(tmp_path, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 16 tensors \(encoder\.layer\.2\."):
        TextEncoder(str(tmp_path))


def test_a_reward_model_draws_its_head_only_for_a_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = spec(save(tmp_path / "base", tie_word_embeddings=False))
    model, tokenizer = reward_model(base, 0)
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    assert torch.equal(load_reward(base, tmp_path / "full")[0].score.weight, model.score.weight)
    edit(tmp_path / "full", lambda d: d.pop("score.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensor \(score\.weight\)"):
        load_reward(base, tmp_path / "full")
    edit(tmp_path / "base", lambda d: d.pop(DOWN))
    with pytest.raises(ModelError, match="down_proj"):
        reward_model(base, 0)
    save(tmp_path / "base", tie_word_embeddings=False)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="no reward head of its own"):
        load_reward(base, tmp_path / "adapter")
