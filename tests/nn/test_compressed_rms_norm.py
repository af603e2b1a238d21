import torch
import torch.nn.functional as F

from taut.nn.norm.compressed_rms_norm import CRMSNorm, compress, decompress


def test_is_the_rms_norm_of_the_vector_that_it_stands_for():
    torch.manual_seed(0)
    x = torch.randn(100, 64, dtype=torch.float64)
    x -= x.mean(-1, keepdim=True)
    want = F.rms_norm(x, (64,), eps=1e-6)
    torch.testing.assert_close(decompress(CRMSNorm(64)(compress(x))), want, rtol=1e-12, atol=1e-12)


def test_a_reader_takes_the_compressed_stream():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 64).double(), torch.randn(64, 32).double()
    want = F.layer_norm(x, (64,), eps=1e-6) @ weight
    stream = compress(x - x.mean(-1, keepdim=True))
    got = CRMSNorm(64)(stream) @ (weight[:-1] - weight[-1:])
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
