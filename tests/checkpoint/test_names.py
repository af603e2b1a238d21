import contextlib
import json
import shutil
import signal
import warnings

import pytest
import torch
from checkpoint.made import sharded
from safetensors.torch import load_file, save_file

from taut.checkpoint import (
    BadInput,
    Change,
    Fill,
    Scale,
    disk_edits,
    locate,
    open_checkpoint,
    round_once,
    write_checkpoint,
)
from taut.checkpoint.names import name_on_disk
from taut.checkpoint.read import Checkpoint
from taut.checkpoint.shards import Shard, TensorInfo

transformers = pytest.importorskip("transformers")

CLASSES = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "ViTForImageClassification",
    "BertForMaskedLM",
    "AlbertForMaskedLM",
    "T5ForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "JambaForCausalLM",
    "DINOv3ViTModel",  # a tensor of no elements
]


def saved(name, folder, **options):
    """A tiny model of a class, saved by transformers, and located on the meta device."""
    from taut.shrink import build_on_meta, tiny_model

    model_class = getattr(transformers, name)
    model = tiny_model(model_class)
    model.save_pretrained(folder, **options)
    checkpoint = open_checkpoint(folder)
    return model, locate(build_on_meta(model_class, checkpoint.hf_config()), checkpoint)


def loaded(model_class, folder):
    """The state of the model as transformers loads it, without what it makes up itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.state_dict()


def change_of(located, name, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = located.shapes[name]
    axis = int(torch.randint(len(shape), (1,), generator=generator))
    vector = 0.5 + torch.rand(shape[axis], dtype=torch.float64, generator=generator)
    along = vector.view([-1 if a == axis else 1 for a in range(len(shape))])

    def rows_of(value, rows):
        return value if rows is None else value[rows]

    if kind == "scale":
        return Change(lambda read, rows: rows_of(read(name, None).double() * along, rows), scale=(axis, vector))
    if kind == "fill":
        return Change(lambda read, rows: rows_of(torch.full(shape, 0.25, dtype=torch.float64), rows), fill=0.25)
    return Change(lambda read, rows: rows_of(read(name, None).double() * along + 0.125, rows))


def held(located, changes):
    """The parameters, of those changed, that each tensor on disk holds; parts that are scaled apart are rebuilt."""
    found = {}
    for key in changes:
        for piece in located[key]:
            found.setdefault(piece.tensor, set()).add(min(located.names_of(key)))
    return found


def round_trip(name, folder):
    """Locate every parameter, change every one in three ways, and compare with what transformers then loads."""
    model, located = saved(name, folder / "a")
    before = loaded(type(model), folder / "a")
    for key, value in before.items():
        if key not in located.absent:
            assert torch.equal(located.read(key), value), key
    for kind in ("scale", "fill", "general"):
        changes, want = {}, dict(before)
        for seed, (key, value) in enumerate(model.named_parameters()):
            if not value.is_floating_point() or not value.ndim:
                continue
            change = change_of(located, key, kind, seed)
            if located.unwritable(key, change.axes) is None:
                changes[key] = change
                new = round_once(change.evaluate(located.read, None).contiguous(), value.dtype)
                want |= dict.fromkeys(located.names_of(key), new)
        edits, extra = disk_edits(located, changes)
        assert changes
        assert not extra
        if kind != "general":
            whole = {tensor for tensor, parameters in held(located, changes).items() if len(parameters) == 1}
            told = {tensor for tensor in edits if located.checkpoint.tensors[tensor].numel}
            told &= whole if kind == "scale" else told
            assert all(isinstance(edits[tensor], Scale if kind == "scale" else Fill) for tensor in told)
        write_checkpoint(located.checkpoint, folder / "b", edits, record={}, force=True)
        after = loaded(type(model), folder / "b")
        for key in before:
            if key not in located.absent:
                assert torch.equal(after[key], want[key]), (kind, key)
    return located


@pytest.mark.parametrize("name", CLASSES)
def test_every_parameter_is_found_and_written_back(tmp_path, name):
    located = round_trip(name, tmp_path)
    assert located.unused == []
    assert located.scattered == {}
    assert all(located.unwritable(key) is None for key in located if key not in located.absent)


def test_parts_that_lie_in_another_order_are_scaled_where_they_lie(tmp_path):
    """Queries, keys and values share a tensor, in which the rows of the first two stand in the order of their pairs."""
    located = round_trip("GradiumPhononTTSModel", tmp_path)
    name = "layers.1.self_attn.q_proj.weight"
    assert "in another order" in located.unwritable(name)
    assert located.unwritable(name, (1,)) is None


def test_experts_on_disk_are_pieces_of_one_parameter(tmp_path):
    _, located = saved("MixtralForCausalLM", tmp_path / "m")
    name = next(key for key in located if key.endswith("experts.gate_up_proj"))
    experts, double, width = located.shapes[name]
    assert len(located[name]) == 2 * experts
    for piece in located[name]:
        expert = int(piece.tensor.split("experts.")[1].split(".")[0])
        start = 0 if piece.tensor.endswith("w1.weight") else double // 2
        assert piece.inside == (slice(expert, expert + 1), slice(start, start + double // 2), slice(0, width))
        assert piece.axes == (None, 0, 1)
    assert torch.equal(located.read(name, slice(1, 2)), located.read(name)[1:2])


def test_a_checkpoint_of_the_base_model_fits_the_model_with_a_head(tmp_path):
    from taut.shrink import build_on_meta, tiny_model

    head = tiny_model(transformers.GPT2LMHeadModel)
    head.transformer.save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert "wte.weight" in checkpoint.tensors
    located = locate(build_on_meta(transformers.GPT2LMHeadModel, checkpoint.hf_config()), checkpoint)
    assert torch.equal(located.read("lm_head.weight"), head.transformer.wte.weight)
    assert located["transformer.h.0.ln_1.weight"][0].tensor == "h.0.ln_1.weight"


def test_old_names_of_layer_norms(tmp_path):
    model, located = saved("BertForMaskedLM", tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(path).items()
    }
    save_file(old, path, metadata={"format": "pt"})
    again = locate(located.model, open_checkpoint(tmp_path / "m"))
    key = "bert.embeddings.LayerNorm.weight"
    assert again[key][0].tensor == "bert.embeddings.LayerNorm.gamma"
    assert torch.equal(again.read(key), model.state_dict()[key])


def altered(folder, change):
    path = folder / "model.safetensors"
    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_unused_missing_and_misshapen(tmp_path):
    _, located = saved("LlamaForCausalLM", tmp_path / "m")
    model, gain = located.model, "model.norm.weight"
    extra = altered(tmp_path / "m", lambda values: values.update({"model.layers.99.more": torch.zeros(2)}))
    assert locate(model, extra).unused == ["model.layers.99.more"]
    with pytest.raises(BadInput, match=r"wrong shape: model\.norm\.weight"):
        locate(model, altered(tmp_path / "m", lambda values: values.update({gain: torch.zeros(3)})))
    with pytest.raises(BadInput, match=r"lack model\.norm\.weight"):
        locate(model, altered(tmp_path / "m", lambda values: values.pop(gain)))


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_a_missing_or_misshapen_expert(tmp_path, wrong):
    _, located = saved("MixtralForCausalLM", tmp_path / "m")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    change = {"missing": lambda v: v.pop(name), "shape": lambda v: v.update({name: torch.zeros(3, 3)})}[wrong]
    with pytest.raises(BadInput, match="wrong shape"):
        locate(located.model, altered(tmp_path / "m", change))


def test_tied_tensors_on_disk_twice(tmp_path):
    model, located = saved("GPT2LMHeadModel", tmp_path / "m")
    assert ["lm_head.weight", "transformer.wte.weight"] in [sorted(names) for names in located.ties]
    same = altered(tmp_path / "m", lambda v: v.update({"lm_head.weight": v["transformer.wte.weight"].clone()}))
    twice = locate(located.model, same)
    gain = torch.full((model.config.n_embd,), 2.0, dtype=torch.float64)
    change = Change(lambda read, rows: gain, scale=(1, gain))
    edits, _ = disk_edits(twice, {"transformer.wte.weight": change})
    assert set(edits) == {"lm_head.weight", "transformer.wte.weight"}
    with pytest.raises(BadInput, match="tensors differ"):
        locate(located.model, altered(tmp_path / "m", lambda v: v["lm_head.weight"].add_(1)))


def test_untied_heads_get_a_tensor_of_their_own(tmp_path):
    from taut.shrink import build_on_meta

    model, _ = saved("GPT2LMHeadModel", tmp_path / "a", max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path / "a")
    config = checkpoint.hf_config()
    config.tie_word_embeddings = False
    meta = build_on_meta(transformers.GPT2LMHeadModel, config)
    with pytest.raises(BadInput, match=r"lack lm_head\.weight"):
        locate(meta, checkpoint)
    located = locate(meta, checkpoint, untied=True)
    assert located.new == ["lm_head.weight"]
    assert name_on_disk(located, "lm_head.weight") == "lm_head.weight"
    gain = 0.5 + torch.rand(config.n_embd, dtype=torch.float64)
    change = Change(lambda read, rows: read("lm_head.weight", rows).double() * gain, scale=(1, gain))
    for changes, factor in (({}, 1.0), ({"lm_head.weight": change}, gain)):
        edits, extra = disk_edits(located, changes)
        untied = {"tie_word_embeddings": False}
        write_checkpoint(
            checkpoint, tmp_path / "b", edits, extra_tensors=extra, config_changes=untied, record={}, force=True
        )
        after = loaded(transformers.GPT2LMHeadModel, tmp_path / "b")
        embedding = model.transformer.wte.weight
        assert torch.equal(after["transformer.wte.weight"], embedding)
        assert torch.equal(after["lm_head.weight"], (embedding.double() * factor).float())


def test_one_tensor_that_holds_several_parameters(tmp_path):
    """Edits of parts of a tensor: one scaling where they agree, box by box where they do not."""
    from taut.checkpoint.names import Located
    from taut.checkpoint.probe import Piece

    value = torch.randn(12, 8)
    values = {"qkv": value}
    (tmp_path / "m").mkdir()
    checkpoint = open_checkpoint(sharded(tmp_path / "m", values | {"x": torch.zeros(1)}))
    located = Located(torch.nn.Module(), checkpoint, {"q": (8, 8), "k": (4, 8)})
    for name, span in (("q", slice(0, 8)), ("k", slice(8, 12))):
        inside = (slice(0, span.stop - span.start), slice(0, 8))
        located[name] = [Piece("qkv", inside, (span, slice(0, 8)), (0, 1))]
    one, two, three = (0.5 + torch.rand(n, dtype=torch.float64) for n in (8, 8, 4))

    def scaled(name, axis, vector):
        by = vector if axis == 1 else vector[:, None]

        def evaluate(read, rows):
            value = read(name, None).double() * by
            return value if rows is None else value[rows]

        return Change(evaluate, scale=(axis, vector))

    cases = [
        ({"q": (1, one), "k": (1, one)}, Scale, value.double() * one),
        ({"q": (0, two), "k": (0, three)}, Scale, value.double() * torch.cat([two, three])[:, None]),
        ({"q": (0, two)}, Scale, value.double() * torch.cat([two, torch.ones(4)])[:, None]),
        ({"q": (1, one), "k": (1, two)}, None, value.double() * torch.cat([one.expand(8, 8), two.expand(4, 8)])),
        ({"k": (1, two)}, None, value.double() * torch.cat([torch.ones(8, 8), two.expand(4, 8)])),
    ]
    for wanted, kind, want in cases:
        edits, _ = disk_edits(located, {name: scaled(name, *by) for name, by in wanted.items()})
        assert isinstance(edits["qkv"], Scale) == (kind is Scale)
        blocks = [edits["qkv"].block(checkpoint.read, slice(i, i + 5)) for i in range(0, 12, 5)]
        assert torch.equal(torch.cat(blocks), want)


def test_full_size_experts_are_located_from_shapes_alone():
    from transformers.core_model_loading import revert_weight_conversion

    from taut.shrink import build_on_meta

    model = build_on_meta(transformers.MixtralForCausalLM, transformers.MixtralConfig(num_hidden_layers=2))
    on_disk = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {n: TensorInfo(v.dtype, tuple(v.shape), "f", 0, v.nbytes) for n, v in on_disk.items()}
    checkpoint = Checkpoint(None, {}, [Shard("f", None, tensors)])
    located = locate(model, checkpoint)
    assert all(located.unwritable(name) is None for name in located)
    last = located["model.layers.1.mlp.experts.gate_up_proj"][-1]
    assert last.tensor == "model.layers.1.block_sparse_moe.experts.7.w3.weight"
    assert last.inside == (slice(7, 8), slice(14336, 28672), slice(0, 4096))


def buildable() -> list[str]:
    """Every class of the library's own lists of models."""
    from transformers.models.auto import modeling_auto

    base = transformers.PreTrainedModel
    lists = [value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")]
    names = {
        name for found in lists for entry in found.values() for name in ([entry] if isinstance(entry, str) else entry)
    }
    found = {name: getattr(transformers, name, None) for name in names if name}
    return sorted(name for name, model in found.items() if isinstance(model, type) and issubclass(model, base))


class TooLong(BaseException):
    """A class cannot be built small in time; none of the code that tries sizes takes it for a size that fails."""


@contextlib.contextmanager
def at_most(seconds: int):
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_every_class_that_can_be_built(tmp_path, capsys):
    """An hour on two cores."""
    from taut.shrink import CannotShrink

    done, skipped, failed = [], [], {}
    for i, name in enumerate(buildable()):
        try:
            with at_most(120):
                round_trip(name, tmp_path / str(i))
            done.append(name)
        except (CannotShrink, TooLong):
            skipped.append(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
        shutil.rmtree(tmp_path / str(i), ignore_errors=True)  # together they are 10 GB
    with capsys.disabled():
        print(f"\n{len(done)} classes round-trip, {len(skipped)} cannot be built small, {len(failed)} fail")
        print(json.dumps(failed, indent=1))
    assert len(done) >= 100
    assert len(failed) <= len(done) // 20
