"""Products with int4 weights against float64, by the 2x rule; in a process of its own, for what it leaves out.

python tests/ops/nibble_cases.py plain    # as on a processor that has no products of bytes
python tests/ops/nibble_cases.py pairs    # as on one that adds two of them and not four
"""

from __future__ import annotations

import sys

import torch
from llvmlite import binding

if "plain" in sys.argv:
    binding.get_host_cpu_features = binding.FeatureMap
elif "pairs" in sys.argv:
    without = binding.FeatureMap(binding.get_host_cpu_features() | {"avx512vnni": False})
    binding.get_host_cpu_features = lambda: without

from taut.ops._numba.planes import INTEGER, PAIRS
from taut.ops._weights import dequantize, quantize
from taut.ops.linear import linear

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from twice import as_accurate


def main() -> None:
    assert PAIRS or "pairs" not in sys.argv
    assert not INTEGER or "plain" not in sys.argv
    torch.manual_seed(0)
    for k in (32, 96, 128, 576, 1568):
        codes, scale = quantize(torch.randn(37, k), 4)
        weight = dequantize(codes, scale, torch.float32)
        for tokens in (1, 2, 5):
            x = torch.randn(tokens, k)
            got = linear(x, codes, scale=scale, impl="numba")
            assert as_accurate(got, x @ weight.T, x.double() @ weight.double().T), (k, tokens)


if __name__ == "__main__":
    main()
