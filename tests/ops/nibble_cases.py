"""Products with int4 weights against float64, by the 2x rule; in a process of its own, for what it leaves out.

python tests/ops/nibble_cases.py plain    # as on a processor that has no instructions of AVX-512
"""

from __future__ import annotations

import sys

import torch
from llvmlite import binding

if "plain" in sys.argv:
    binding.get_host_cpu_features = binding.FeatureMap

from taut.ops._numba.nibbles import INTEGER
from taut.ops._weights import dequantize, quantize
from taut.ops.linear import linear

sys.path.insert(0, __file__.rsplit("/", 2)[0])
from twice import as_accurate


def main() -> None:
    assert ("plain" in sys.argv) != INTEGER or not binding.get_host_cpu_features().get("avx512vnni")
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
