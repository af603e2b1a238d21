import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.checkpoint import probe as module
from taut.checkpoint.probe import Piece, length, probe

CONVERSIONS = {
    "stack": (4, lambda x: torch.stack(x)),
    "stack and join": (4, lambda x: torch.cat([torch.stack(x[:2]), torch.stack(x[2:])], 1)),
    "join rows": (3, lambda x: torch.cat(x)),
    "join columns": (3, lambda x: torch.cat(x, 1)),
    "turn": (1, lambda x: x[0].T.contiguous()),
    "stack turned": (3, lambda x: torch.stack(x).transpose(1, 2).contiguous()),
    "flatten": (2, lambda x: torch.stack(x).reshape(2, -1)),
    "new axis": (1, lambda x: x[0][None, :, None]),
    "shuffle rows": (1, lambda x: x[0].unflatten(0, (4, -1)).transpose(0, 1).reshape(x[0].shape)),
}
SPLITS = {"rows": lambda x: torch.chunk(x[0], 2), "columns": lambda x: torch.chunk(x[0], 2, 1)}


def run(count, shape, make, names=("p",)):
    tensors = {f"t{i}": torch.randn(shape) for i in range(count)}

    def convert(values, shorten):
        made = make([values[name] for name in tensors])
        return dict(zip(names, [made] if isinstance(made, torch.Tensor) else made, strict=True))

    made = convert(tensors, None)
    found = probe(convert, {n: t.shape for n, t in tensors.items()}, {n: tuple(t.shape) for n, t in made.items()})
    return tensors, made, found


def rebuilt(tensors, pieces, shape):
    out = torch.full(shape, torch.nan)
    for piece in pieces:
        box = tensors[piece.tensor][piece.part]
        along = [a for a in piece.axes if a is not None]
        box = box.permute(*along, *[a for a in range(box.ndim) if a not in along])
        out[piece.inside] = box.reshape([length(s) for s in piece.inside])
    return out


@pytest.mark.parametrize(("count", "make"), CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("quick", [1 << 20, 3000])
@given(rows=st.sampled_from([16, 24, 48, 80]), columns=st.sampled_from([16, 32, 72]))
def test_pieces_put_together_are_the_parameter(count, make, quick, rows, columns):
    before, module.QUICK = module.QUICK, quick
    try:
        tensors, made, found = run(count, (rows, columns), make)
    finally:
        module.QUICK = before
    if all(piece.in_order for piece in found["p"]):
        assert torch.equal(rebuilt(tensors, found["p"], made["p"].shape), made["p"])


def test_what_is_in_order_and_what_is_not():
    order = {name: run(count, (16, 16), make)[2]["p"][0].axes for name, (count, make) in CONVERSIONS.items()}
    assert order == {
        "stack": (None, 0, 1),
        "stack and join": (None, 0, 1),
        "join rows": (0, 1),
        "join columns": (0, 1),
        "turn": (1, 0),
        "stack turned": (None, 1, 0),
        "flatten": (None, None),
        "new axis": (None, 0, None, 1),
        "shuffle rows": (None, 1),
    }
    for name in ("shuffle rows", "flatten"):
        assert not run(CONVERSIONS[name][0], (16, 16), CONVERSIONS[name][1])[2]["p"][0].in_order
    assert run(2, (16, 16), CONVERSIONS["stack"][1])[2]["p"][0].in_order


@pytest.mark.parametrize("make", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("quick", [1 << 20, 200])
def test_one_tensor_may_make_several_parameters(monkeypatch, make, quick):
    monkeypatch.setattr(module, "QUICK", quick)
    tensors, made, found = run(1, (32, 48), make, ("p", "q"))
    for name, value in made.items():
        assert torch.equal(rebuilt(tensors, found[name], value.shape), value)


def test_large_tensors_are_probed_without_building_them():
    def convert(values, shorten):
        assert sum(value.numel() for value in values.values()) <= module.QUICK
        return {"p": torch.stack(list(values.values()))}

    shapes = {f"e{i}": (7168, 2048) for i in range(256)}
    found = probe(convert, shapes, {"p": (256, 7168, 2048)})["p"]
    assert found[200] == Piece(
        "e200", (slice(200, 201), slice(0, 7168), slice(0, 2048)), (slice(0, 7168), slice(0, 2048)), (None, 0, 1)
    )


def test_a_conversion_that_asks_for_shapes_sees_them_cut_alike():
    full = (60, 1408, 2048)

    def convert(values, shorten):
        value = values["t"]
        return {"p": value if tuple(value.shape) == shorten(full) else value.transpose(1, 2)}

    assert probe(convert, {"t": full}, {"p": full})["p"][0].axes == (0, 1, 2)
    assert probe(convert, {"t": (60, 2048, 1408)}, {"p": full})["p"][0].axes == (0, 2, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[0] * 2,
        lambda x: torch.cat([x[0][:8], x[0][:8]]),
        lambda x: torch.stack([x[0], x[1]], 1).flatten(0, 1),
    ],
    ids=["computes", "repeats", "interleaves"],
)
def test_what_is_no_set_of_boxes_is_refused(make):
    with pytest.raises(ValueError, match="cannot tell"):
        run(2, (16, 16), make)


def test_elements_in_no_order_are_found_but_not_in_order():
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    _, _, found = run(1, (16, 16), lambda x: x[0].flatten()[order].view(16, 16))
    assert found["p"][0].axes == (None, None)
    assert not found["p"][0].in_order
