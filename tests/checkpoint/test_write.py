import json

import numpy as np
import pytest
import torch
from checkpoint.made import contents, pickled, sharded, single, tensors
from safetensors import safe_open
from safetensors.torch import load_file

from taut.checkpoint import (
    BadInput,
    Copy,
    Fill,
    Mismatch,
    OutOfRange,
    Scale,
    open_checkpoint,
    round_once,
    stream,
    write_checkpoint,
    write_taut,
)

FORMS = {"single": single, "sharded": sharded}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def vector(size, seed=0):
    return 0.5 + torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scaled(checkpoint, name, axis, seed=0):
    info = checkpoint.tensors[name]
    return Scale(name, info, axis, vector(info.shape[axis], seed))


def weights(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def header(path):
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_without_edits_every_file_comes_back_byte_for_byte(tmp_path, make):
    source = make(tmp_path / "a")
    (source / "LICENSE").write_text("MIT")
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "sub" / "deep" / "chat_template.jinja").write_bytes(b"\r\n{{ x }}")
    (source / "model.gguf").write_bytes(b"x")
    write_checkpoint(open_checkpoint(source), tmp_path / "b", {}, record={"b": 1, "a": "é"})
    want = contents(source)
    del want["model.gguf"]
    want["taut.json"] = '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    assert contents(tmp_path / "b") == want


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edits_are_what_they_say_and_the_rest_stays(tmp_path, make, dtype):
    before = tensors(dtype)
    checkpoint = open_checkpoint(make(tmp_path / "a", before))
    by_row, by_column, middle = vector(7), vector(33, 1), vector(4, 2)
    edits = {
        "a.weight": Scale("a.weight", checkpoint.tensors["a.weight"], 0, by_row),
        "big.weight": Scale("big.weight", checkpoint.tensors["big.weight"], 1, by_column),
        "b.weight": Scale("b.weight", checkpoint.tensors["b.weight"], 1, middle),
        "gain": Fill((5,), dtype, 1.0),
        "scalar": Fill((), dtype, 0.25),
    }
    write_checkpoint(checkpoint, tmp_path / "b", edits, record={})
    after = weights(tmp_path / "b")
    want = dict(before)
    want["a.weight"] = round_once(before["a.weight"].double() * by_row[:, None], dtype)
    want["big.weight"] = round_once(before["big.weight"].double() * by_column, dtype)
    want["b.weight"] = round_once(before["b.weight"].double() * middle[:, None], dtype)
    want |= {"gain": torch.ones(5, dtype=dtype), "scalar": torch.tensor(0.25, dtype=dtype)}
    assert after.keys() == want.keys()
    for name in want:
        assert torch.equal(after[name], want[name]), name
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert header(path) == header(tmp_path / "b" / path.name)


class Doubled:
    """A general edit, in a shape and dtype of its own."""

    def __init__(self, name, shape, dtype):
        self.name, self.shape, self.dtype = name, shape, dtype
        self.asked = []

    def block(self, read, rows):
        self.asked.append(rows)
        return 2 * read(self.name, rows).double()


def test_general_edits_are_asked_for_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "EDIT", 33 * 10)
    before = tensors()
    checkpoint = open_checkpoint(single(tmp_path / "a", before))
    edit = Doubled("big.weight", (64, 33), torch.float32)
    write_checkpoint(checkpoint, tmp_path / "b", {"big.weight": edit}, record={})
    after = weights(tmp_path / "b")["big.weight"]
    assert after.dtype is torch.float32
    assert torch.equal(after, 2 * before["big.weight"].float())
    rows = [row for span in edit.asked for row in range(*span.indices(64))]
    assert sorted(rows) == list(range(64))
    assert max(len(range(*span.indices(64))) for span in edit.asked) <= 10


@pytest.mark.parametrize("block", [16, 24, 1000])
def test_blocks_of_any_size_give_the_same_bytes(tmp_path, monkeypatch, block):
    checkpoint = open_checkpoint(sharded(tmp_path / "a"))
    edits = {"big.weight": scaled(checkpoint, "big.weight", 1), "b.weight": scaled(checkpoint, "b.weight", 1)}
    write_checkpoint(checkpoint, tmp_path / "b", edits, record={})
    monkeypatch.setattr(stream, "BLOCK", block)
    monkeypatch.setattr(stream, "EDIT", block)
    write_checkpoint(checkpoint, tmp_path / "c", edits, record={})
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_twice_gives_the_same_bytes(tmp_path):
    checkpoint = open_checkpoint(sharded(tmp_path / "a"))
    edits = {"big.weight": scaled(checkpoint, "big.weight", 0)}
    extra = {"new": Fill((2,), torch.bfloat16, 3.0)}
    for name in "bc":
        write_checkpoint(
            checkpoint, tmp_path / name, edits, record={"x": 1}, extra_tensors=extra, config_changes={"y": 2}
        )
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_extra_tensors_go_into_the_last_file(tmp_path, make):
    before = tensors()
    checkpoint = open_checkpoint(make(tmp_path / "a", before))
    info = checkpoint.tensors["big.weight"]
    extra = {"head": Scale("big.weight", info, 1, vector(33)), "same": Copy("ids", checkpoint.tensors["ids"])}
    write_checkpoint(
        checkpoint, tmp_path / "b", {}, record={}, extra_tensors=extra, config_changes={"tie_word_embeddings": True}
    )
    last = sorted((tmp_path / "b").glob("*.safetensors"))[-1]
    with safe_open(last, "pt") as file:
        assert {"head", "same"} <= set(file.keys())
        assert file.metadata()["format"] == "pt"
    after = weights(tmp_path / "b")
    assert torch.equal(after["head"], round_once(before["big.weight"].double() * vector(33), torch.bfloat16))
    assert torch.equal(after["same"], before["ids"])
    assert {name: after[name] for name in before}.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    reopened = open_checkpoint(tmp_path / "b")
    assert reopened.config == checkpoint.config | {"tie_word_embeddings": True}
    if checkpoint.index:
        old, new = checkpoint.index["metadata"], (reopened.index or {})["metadata"]
        grown = 64 * 33 + before["ids"].numel()
        size = old["total_size"] + info.nbytes + before["ids"].numel() * 8
        assert new == old | {"total_size": size, "total_parameters": old["total_parameters"] + grown}


def test_no_tensor_starts_at_an_odd_place(tmp_path):
    checkpoint = open_checkpoint(single(tmp_path / "a", {"x": torch.ones(3), "odd": torch.zeros(5, dtype=torch.bool)}))
    info = checkpoint.tensors["x"]
    write_checkpoint(checkpoint, tmp_path / "b", {}, record={}, extra_tensors={"y": Copy("x", info)})
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")["y"], torch.ones(3))
    assert all(i.offset % i.dtype.itemsize == 0 for i in open_checkpoint(tmp_path / "b").tensors.values())


def test_pickled_comes_back_as_safetensors(tmp_path):
    before = tensors()
    shared = before | {"tied": before["big.weight"], "turned": before["a.weight"].T}
    checkpoint = open_checkpoint(pickled(tmp_path / "a", shared))
    edits = {"big.weight": scaled(checkpoint, "big.weight", 1)}
    write_checkpoint(checkpoint, tmp_path / "b", edits, record={})
    after = load_file(tmp_path / "b" / "model.safetensors")
    want = shared | {"big.weight": round_once(before["big.weight"].double() * vector(33), torch.bfloat16)}
    assert after.keys() == want.keys()
    assert all(torch.equal(after[name], want[name]) for name in want)
    assert not list((tmp_path / "b").glob("*.bin"))


def test_sharded_pickles(tmp_path):
    folder, before = tmp_path / "a", tensors()
    source = pickled(folder, before)
    halves = [sorted(before)[::2], sorted(before)[1::2]]
    for i, names in enumerate(halves, 1):
        torch.save({name: before[name] for name in names}, source / f"pytorch_model-0000{i}-of-00002.bin")
    (source / "pytorch_model.bin").unlink()
    weight_map = {n: f"pytorch_model-0000{i}-of-00002.bin" for i, names in enumerate(halves, 1) for n in names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    write_checkpoint(open_checkpoint(source), tmp_path / "b", {}, record={})
    after = open_checkpoint(tmp_path / "b")
    assert [shard.name for shard in after.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(torch.equal(after.read(name), before[name]) for name in before)


def test_taut_form(tmp_path, monkeypatch):
    from taut.checkpoint import write

    monkeypatch.setattr(write, "LARGEST_SHARD", 3000)
    checkpoint = open_checkpoint(single(tmp_path / "a"))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    tensors_ = {
        "merged": Doubled("big.weight", (64, 33), torch.bfloat16),
        "kept": Copy("ids", checkpoint.tensors["ids"]),
        "b": scaled(checkpoint, "b.weight", 2),
    }
    write_taut(checkpoint, tmp_path / "b", tensors_, record={"schema": 1})
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    shards = ["taut-00001-of-00002.safetensors", "taut-00002-of-00002.safetensors"]
    assert names == sorted(["config.json", "taut.json", "taut.safetensors.index.json", "tokenizer.json", *shards])
    reopened = open_checkpoint(tmp_path / "b")
    assert reopened.prior.record == {"schema": 1}
    assert torch.equal(reopened.read("merged"), 2 * checkpoint.read("big.weight"))
    assert torch.equal(reopened.read("kept"), checkpoint.read("ids"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_not_finite_is_named_and_nothing_is_left(tmp_path, dtype):
    values = tensors(dtype)
    values["a.weight"][1, 1] = torch.nan
    values["big.weight"][0, :3] = -torch.inf
    checkpoint = open_checkpoint(single(tmp_path / "a", values))
    with pytest.raises(BadInput, match=r"a\.weight \(1\), big\.weight \(3\)"):
        write_checkpoint(checkpoint, tmp_path / "b", {"big.weight": scaled(checkpoint, "big.weight", 1)}, record={})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    excused = {"a.weight", "big.weight"}
    edit = {"big.weight": scaled(checkpoint, "big.weight", 1)}
    with pytest.raises(BadInput, match=r"in big\.weight \(3\)"):
        write_checkpoint(checkpoint, tmp_path / "b", edit, record={}, may_be_nonfinite=excused)
    write_checkpoint(checkpoint, tmp_path / "b", {}, record={}, may_be_nonfinite=excused)
    assert contents(tmp_path / "b").items() >= contents(tmp_path / "a").items()


def test_out_of_range_is_named_and_nothing_is_left(tmp_path):
    values = {"w": torch.tensor([[1.0, 60000.0], [6.2e-5, 0.0]], dtype=torch.float16)}
    checkpoint = open_checkpoint(single(tmp_path / "a", values))
    info = checkpoint.tensors["w"]
    for factor, word in ((2.0, "1 overflow"), (0.9, "1 become subnormal or zero")):
        edit = Scale("w", info, 1, torch.full((2,), factor, dtype=torch.float64))
        with pytest.raises(OutOfRange, match=word) as caught:
            write_checkpoint(checkpoint, tmp_path / "b", {"w": edit}, record={})
        assert set(caught.value.tensors) == {"w"}
        general = Doubled("w", (2, 2), torch.float16)
        general.block = lambda read, rows, factor=factor: factor * read("w", rows).double()
        with pytest.raises(OutOfRange, match=word):
            write_checkpoint(checkpoint, tmp_path / "b", {"w": general}, record={})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def damage(monkeypatch, which):
    """Flip one bit of every block of `which` tensor on its way to the disk."""
    write = stream.Streamer._write

    def flip(self, block, raw):
        if block.name == which:
            raw = raw.copy()
            raw[raw.size // 2] ^= 1
        write(self, block, raw)

    monkeypatch.setattr(stream.Streamer, "_write", flip)


@pytest.mark.parametrize("which", ["ids", "big.weight", "gain", "a.weight"])
def test_what_was_written_is_checked(tmp_path, monkeypatch, which):
    checkpoint = open_checkpoint(single(tmp_path / "a"))
    edits = {
        "big.weight": scaled(checkpoint, "big.weight", 1),
        "gain": Fill((5,), torch.bfloat16, 1.0),
        "a.weight": Doubled("a.weight", (7, 5), torch.bfloat16),
    }
    damage(monkeypatch, which)
    with pytest.raises(Mismatch, match=which):
        write_checkpoint(checkpoint, tmp_path / "b", edits, record={})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    write_checkpoint(checkpoint, tmp_path / "b", edits, record={}, verify=False)


def test_a_source_that_shrinks_meanwhile(tmp_path):
    checkpoint = open_checkpoint(single(tmp_path / "a"))
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="ends before"):
        write_checkpoint(checkpoint, tmp_path / "b", {}, record={})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_edits_of_what_is_not_there_and_of_the_wrong_size(tmp_path):
    checkpoint = open_checkpoint(single(tmp_path / "a"))
    info = checkpoint.tensors["a.weight"]
    with pytest.raises(ValueError, match="nowhere"):
        write_checkpoint(checkpoint, tmp_path / "b", {"nowhere": Fill((1,), torch.float32, 0.0)}, record={})
    with pytest.raises(ValueError, match="does not fit"):
        Scale("a.weight", info, 1, vector(7))
    with pytest.raises(TypeError, match="float64"):
        Scale("a.weight", info, 1, vector(5).float())
    with pytest.raises(ValueError, match="the edit gave"):
        write_checkpoint(checkpoint, tmp_path / "b", {"a.weight": Doubled("b.weight", (7, 5), info.dtype)}, record={})


def test_progress_ends_at_the_total(tmp_path):
    checkpoint = open_checkpoint(sharded(tmp_path / "a"))
    heard = []
    write_checkpoint(
        checkpoint, tmp_path / "b", {}, record={}, progress=lambda done, total: heard.append((done, total))
    )
    assert heard == sorted(heard)
    assert heard[-1] == (checkpoint.total_bytes, checkpoint.total_bytes)


def test_symlinks_become_files(tmp_path):
    blobs, source = single(tmp_path / "blobs"), tmp_path / "a"
    (blobs / "inner").mkdir()
    (blobs / "inner" / "x.txt").write_text("x")
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    write_checkpoint(open_checkpoint(source), tmp_path / "b", {}, record={})
    written = tmp_path / "b"
    assert not any(path.is_symlink() for path in written.rglob("*"))
    assert (written / "inner" / "x.txt").read_text() == "x"


def test_stock_transformers_loads_it(tmp_path):
    import transformers

    config = json.loads((single(tmp_path / "x") / "config.json").read_text())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.save_pretrained(tmp_path / "a", max_shard_size="1KB")
    checkpoint = open_checkpoint(tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj.weight"
    write_checkpoint(checkpoint, tmp_path / "b", {name: scaled(checkpoint, name, 1)}, record={})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    for key, value in model.state_dict().items():
        want = (value.double() * vector(8)).float() if key == name else value
        assert np.array_equal(loaded[key].numpy(), want.numpy()), key
