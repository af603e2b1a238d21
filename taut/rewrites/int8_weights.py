"""Keep the weights of linear layers and of the token embedding in 8 bits, with a scale a row.

    W  ->  round(W / s) in int8,   s = max|W| / 127 for every row

A layer multiplies by s what it computed with the codes; an embedding looks up a row of codes. Inputs and sums stay as
they are. Apart from the rounding the rewrite is exact, and proved so; what the rounding costs is measured.

Source: Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339, section 2 (absmax quantization, a scale a row).
Differs: only weights are rounded, never activations, so that no outliers have to be kept apart. Promised: the
divergence from the original is at most twice that of noise as even and as large as the rounding's (Bennett, 1948), and
on a text the perplexity rises by at most 0.5 %.
"""

from __future__ import annotations

from taut.rewrites._quantized import rewrite

int8_weights = rewrite("int8_weights", bits=8, perplexity=0.005)
