"""Before against after in one run: transformers and taut's engine, interleaved, and nothing printed that is not equal.

Parity comes first (see `taut/parity.py`); where it fails there are no numbers.
"""

from taut.benchmark.results import Bench, Timed
from taut.benchmark.run import bench
from taut.benchmark.runners import Compiled, Eager, Engine, Ours

__all__ = ["Bench", "Compiled", "Eager", "Engine", "Ours", "Timed", "bench"]
