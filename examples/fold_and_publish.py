"""Fold the norms of a checkpoint, prove that it is the same model, and print how to put it on the hub.

    python examples/fold_and_publish.py [MODEL] [--out DIR] [--repo USER/NAME]

MODEL is a directory or a hub id; by default the small model that comes with taut. The result is an ordinary checkpoint
that transformers loads without taut. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import taut
from taut.demonstrate import MODEL


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?", default=str(MODEL))
    options.add_argument("--out", type=Path, default=Path("folded"))
    options.add_argument("--repo", default="USER/NAME")
    given = options.parse_args()

    done = taut.apply(given.model, out=given.out, only=["fold_norm"])
    if done.out is None:
        print("Nothing applies to this model, so nothing was written:")
        print("\n".join(f"  {refusal.where}: {refusal.reason}" for refusal in done.plan.refused))
        return 0
    print(f"{done.plan.applied} norms folded; {len(done.plan.refused)} places refused.")

    evidence = taut.verify(given.model, given.out)
    print(f"the same model: {evidence.passed} (float64 error {evidence.float64_error:.1e}, limit 1e-12)")
    if not evidence.passed:
        return 1
    print(f"\nPublish it with\n  hf upload {given.repo} {given.out} .")
    return 0


if __name__ == "__main__":
    sys.exit(main())
