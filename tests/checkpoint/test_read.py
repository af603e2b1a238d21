import json
import struct

import pytest
import torch
from checkpoint.made import CONFIG, config, pickled, sharded, single, tensors
from safetensors.torch import load_file

from taut.checkpoint import BadInput, open_checkpoint

OPENERS = {"single": single, "sharded": sharded, "pickled": pickled}


@pytest.mark.parametrize("make", OPENERS.values(), ids=OPENERS)
def test_reads_what_was_saved(tmp_path, make):
    want = tensors()
    checkpoint = open_checkpoint(make(tmp_path / "m", want))
    assert set(checkpoint.tensors) == set(want)
    assert checkpoint.total_bytes == sum(t.numel() * t.element_size() for t in want.values())
    for name, value in want.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (value.dtype, tuple(value.shape))
        assert torch.equal(checkpoint.read(name), value)
        if value.ndim:
            assert torch.equal(checkpoint.read(name, slice(1, 3)), value[1:3])
            assert torch.equal(checkpoint.read(name, slice(None, 99)), value)
            assert checkpoint.read(name, slice(3, 2)).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.bool])
def test_dtypes(tmp_path, dtype):
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    checkpoint = open_checkpoint(single(tmp_path / "m", {"x": value, "empty": torch.zeros(0, 3, dtype=dtype)}))
    assert torch.equal(checkpoint.read("x"), value)
    assert checkpoint.read("empty").shape == (0, 3)


def refused(path, *words, **options):
    with pytest.raises(BadInput) as caught:
        open_checkpoint(path, **options)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.cure
    return caught.value


def test_folder_that_is_none(tmp_path):
    refused(tmp_path / "missing", "missing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a folder")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("x")
    refused(tmp_path / "bare", "no config.json")
    config(tmp_path / "light")
    refused(tmp_path / "light", "no weights")
    assert open_checkpoint(tmp_path / "light", weights=False).tensors == {}
    refused(single(tmp_path / "m"), "has no revisions", revision="main")


@pytest.mark.parametrize("text", ["{", "[]", "nonsense", "[" * 100_000, b"\xff\xfe"])
def test_config_that_is_no_json_object(tmp_path, text):
    folder = single(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(folder, "config.json", "JSON")


def header(folder):
    data = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite_header(folder, change):
    fields, data = header(folder)
    text = json.dumps(change(fields) or fields).encode() if callable(change) else change
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -700])
def test_truncated(tmp_path, keep):
    folder = single(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors", "truncated")


def test_trailing_bytes(tmp_path):
    folder = single(tmp_path / "m")
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0" * 3)
    refused(folder, "model.safetensors", "belong to no tensor")


BROKEN = {
    "dtype unknown": lambda h: h["gain"].update(dtype="F6_E2M3"),
    "dtype missing": lambda h: h["gain"].pop("dtype"),
    "extra field": lambda h: h["gain"].update(more=1),
    "shape too large": lambda h: h["gain"].update(shape=[6]),
    "shape negative": lambda h: h["gain"].update(shape=[-5]),
    "shape float": lambda h: h["gain"].update(shape=[5.0]),
    "shape huge": lambda h: h["gain"].update(shape=[2**40, 2**40]),
    "offsets reversed": lambda h: h["gain"].update(data_offsets=h["gain"]["data_offsets"][::-1]),
    "offsets beyond": lambda h: h["gain"].update(data_offsets=[10**9, 10**9 + 10]),
    "offsets overlap": lambda h: h["gain"].update(data_offsets=h["a.weight"]["data_offsets"], shape=[7, 5]),
    "hole": lambda h: h.pop("gain") and None,
    "entry is a list": lambda h: h.update(gain=[1]),
    "metadata": lambda h: h.update(__metadata__={"format": 1}),
    "not an object": lambda h: [h],
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_corrupt_header(tmp_path, change):
    folder = single(tmp_path / "m")
    rewrite_header(folder, change)
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff" * 20, b'{"x": NaN}', b'{"x": 1, "x": 2}', b"[" * 50_000])
def test_header_that_is_no_json(tmp_path, text):
    folder = single(tmp_path / "m")
    rewrite_header(folder, text)
    refused(folder, "model.safetensors", "header")


def test_other_files_in_place_of_weights(tmp_path):
    folder = single(tmp_path / "m")
    for content in (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"<html></html>" * 9,
        b"PK\3\4",
    ):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, "model.safetensors", "not a safetensors file")


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    value = change(value) or value
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:x", "x\0y", 7, None]
)
def test_index_that_leaves_the_folder(tmp_path, name):
    folder = sharded(tmp_path / "m")
    (tmp_path / "evil.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index(folder, lambda i: i["weight_map"].update({"a.weight": name}))
    refused(folder, "index.json")


INDEXES = {
    "no map": (lambda i: i.pop("weight_map") and None, "no weight_map"),
    "empty map": (lambda i: i.update(weight_map={}), "no weight_map"),
    "a file is missing": (lambda i: i["weight_map"].update(x="model-3.safetensors"), "missing"),
    "a name is nowhere": (lambda i: i["weight_map"].update(x="model-00001-of-00002.safetensors"), "'x'"),
    "a name is left out": (lambda i: i["weight_map"].pop("gain") and None, "'gain'"),
    "a name is elsewhere": (lambda i: i["weight_map"].update(swap(i["weight_map"])), "should be in"),
}


def swap(weight_map):
    one, two = sorted(set(weight_map.values()))
    return {"gain": two if weight_map["gain"] == one else one}


@pytest.mark.parametrize(("change", "word"), INDEXES.values(), ids=INDEXES)
def test_wrong_index(tmp_path, change, word):
    folder = sharded(tmp_path / "m")
    index(folder, change)
    refused(folder, "index.json", word)


def test_a_name_in_two_files(tmp_path):
    folder = sharded(tmp_path / "m")
    one, two = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    two.write_bytes(one.read_bytes())
    refused(folder, "is in both")


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('/tmp/taut-was-here').touch()",))


def test_pickles_run_nothing(tmp_path):
    folder = pickled(tmp_path / "m")
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "weights_only")
    torch.save({"x": torch.zeros(2), "y": "text"}, folder / "pytorch_model.bin")
    refused(folder, "plain dictionary")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    refused(folder, "pytorch_model.bin")


def test_old_pickle_format(tmp_path):
    folder, want = pickled(tmp_path / "m"), tensors()
    torch.save(want, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(folder).read("big.weight"), want["big.weight"])


def test_safetensors_win_over_other_formats_which_are_named(tmp_path):
    folder = single(tmp_path / "m")
    weights = ["consolidated.safetensors", "flax_model.msgpack", "model-q4.gguf", "onnx/model.onnx"]
    weights += ["original/consolidated.00.pth", "original/params.json", "pytorch_model.bin", "tf_model.h5"]
    for name in [*weights, "sub/notes.txt"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.other_files() == ["config.json", "sub/notes.txt"]
    assert checkpoint.skipped_weights() == weights


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantized(tmp_path, method, nested):
    folder, found = single(tmp_path / "m"), {"quantization_config": {"quant_method": method, "bits": 4}}
    config(folder, **({"text_config": found} if nested else found))
    refused(folder, method, "requantized")


def test_quantized_without_saying_so(tmp_path):
    folder = single(tmp_path / "m")
    (folder / "quantize_config.json").write_text("{}")
    refused(folder, "quantized")
    refused(single(tmp_path / "n", {"x": torch.zeros(4).to(torch.float8_e4m3fn)}), "fp8", "requantized")


def test_adapter(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    (tmp_path / "m" / "adapter_model.safetensors").write_bytes(b"")
    assert "merge" in refused(tmp_path / "m", "adapter").cure


def test_remote_code(tmp_path):
    folder = single(tmp_path / "m")
    config(folder, model_type="never-heard-of", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    assert "--trust-remote-code" in refused(folder, "auto_map").cure
    assert open_checkpoint(folder, trust_remote_code=True).trust_remote_code
    config(folder, auto_map={"AutoConfig": "code.Config"})
    assert open_checkpoint(folder).hf_config().model_type == CONFIG["model_type"]


def test_config_that_transformers_cannot_read(tmp_path):
    folder = single(tmp_path / "m")
    config(folder, model_type="never-heard-of")
    with pytest.raises(BadInput, match="never-heard-of"):
        open_checkpoint(folder).hf_config()


def test_traces_of_earlier_runs(tmp_path):
    folder = single(tmp_path / "m")
    assert not open_checkpoint(folder).prior
    config(folder, flash_norm=True, flashnorm_folded=["q"])
    (folder / "taut.json").write_text('{"schema": 1}')
    prior = open_checkpoint(folder).prior
    assert prior.record == {"schema": 1}
    assert prior.marks == {"flash_norm": True, "flashnorm_folded": ["q"]}


def test_symlinks_are_read_through_and_broken_ones_named(tmp_path):
    blobs, folder = single(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.other_files() == ["config.json"]
    assert torch.equal(checkpoint.read("gain"), load_file(blobs / "model.safetensors")["gain"])
    (folder / "notes").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="notes"):
        open_checkpoint(folder).other_files()
