"""One self-contained page about a model: what applies, what it costs, what was proved, and where."""

from taut.report.bench_page import bench_page
from taut.report.inspect_page import inspection_page

__all__ = ["bench_page", "inspection_page"]
