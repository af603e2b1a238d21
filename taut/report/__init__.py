"""One self-contained page about a model: what applies, what it costs, what was proved, and where."""

from __future__ import annotations

from pathlib import Path

from taut.report.bench_page import bench_page
from taut.report.inspect_page import inspection_page

__all__ = ["bench_page", "inspection_page", "write"]


def write(page: str, path: Path) -> None:
    """Raises BadInput where the file cannot be written."""
    from taut.checkpoint import BadInput

    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}", "name a file in a folder that exists") from error
