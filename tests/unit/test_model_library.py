"""Models that `autopar plan` takes by name."""

import json
import time

import pytest
import torch
import transformers

from autopar import ShardingPlan
from autopar.cli.app import app
from autopar.cli.model_library import Source, example_of
from autopar.ir.graph import shape_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 64, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_configuration_has_its_dtype_and_the_sizes_that_were_asked_for(config):
    for name in (config, config.parent):
        example, source = example_of(f"hf:{name}", batch=4, sequence=32)
        assert isinstance(example.model, transformers.LlamaForCausalLM) and example.model.training
        assert {p.dtype for p in example.model.parameters()} == {torch.bfloat16}
        assert all(p.is_meta for p in example.model.parameters())
        assert shape_of(example.kwargs["input_ids"]) == (4, 32)
        assert source == f"hf:{name}?batch=4&sequence=32"
        assert shape_of(example_of(source)[0].kwargs["labels"]) == (4, 32)
    assert shape_of(example_of(f"hf:{config}")[0].kwargs["labels"]) == (8, 64)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("BertForMaskedLM", {"input_ids", "labels"}),
        ("BertForSequenceClassification", {"input_ids", "labels"}),
        ("T5ForConditionalGeneration", {"input_ids", "labels"}),
        ("ViTForImageClassification", {"pixel_values", "labels"}),
    ],
)
def test_inputs_follow_from_the_class(tmp_path, name, inputs):
    model_class = getattr(transformers, name)
    config = model_class.config_class(
        architectures=[name], dtype="float32", decoder_start_token_id=0, pad_token_id=0
    )
    config.save_pretrained(tmp_path)
    example, _ = example_of(f"hf:{tmp_path}", batch=2)
    assert type(example.model) is model_class and example.kwargs.keys() == inputs
    assert example.model(**example.kwargs).loss.is_meta


def test_timm():
    example, source = example_of("timm:vit_tiny_patch16_224", batch=3)
    assert shape_of(example.args[0]) == (3, 3, 224, 224)
    assert source == "timm:vit_tiny_patch16_224?batch=3"


def test_what_is_wrong_is_named(config, tmp_path):
    wrong = {
        "hf:": "a name must follow",
        "hf:nothing/config.json": r"nothing/config.json does not exist",
        f"hf:{config}?batch=0": "batch must be a positive number",
        f"hf:{config}?tokens=3": "not tokens",
        "timm:no_such_model": "no_such_model",
        "timm:resnet18?sequence=4": "no sequence",
    }
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            example_of(text)
    for change, message in {
        "hidden_size": 130,
        "quantization_config": {"quant_method": "bitsandbytes"},
        "architectures": ["pipeline"],
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {change: message}))
        with pytest.raises(ValueError, match=f"hf:{tmp_path}: "):
            example_of(f"hf:{tmp_path}")
    with pytest.raises(
        ValueError, match=r"does not take batch; define it as example_inputs\(batch=8\)"
    ):
        example_of("examples/gpt2.py", batch=3)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="no such class; write a model file"):
        example_of(f"hf:{tmp_path}")


def test_without_a_network_one_try_is_made(monkeypatch):
    import huggingface_hub

    tries = []

    def unreachable(url, **_):
        tries.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="hf:no/where: We couldn't connect"):
        example_of("hf:no/where")
    assert len(tries) == 1 and "/no/where/" in tries[0]
    assert time.monotonic() - begin < 10


def test_a_plan_from_a_configuration_explains_itself(config, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    sizes = ["--batch", "8", "--sequence", "16"]
    app(["plan", f"hf:{config}", *sizes, "--mesh", "2", "-o", str(plan)], standalone_mode=False)
    out = capsys.readouterr().out
    assert out.startswith("fits") and "yes: " in out.splitlines()[0]
    assert ShardingPlan.load(plan).source == str(Source.of(f"hf:{config}", batch=8, sequence=16))
    app(["explain", str(plan), "model.layers.*.mlp.up_proj.weight"], standalone_mode=False)
    assert "planned: " in capsys.readouterr().out
