"""Compare two rewrites of one model: what each saves on a machine, and how well each is proved.

    python examples/compare_rewrites.py [--rewrites fold_norm merge_linears] [--machine h200-sxm]

The model is the small one that comes with taut, loaded by transformers; any nn.Module will do.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM

import taut
from taut.demonstrate import MODEL


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rewrites", nargs=2, default=["fold_norm", "merge_linears"], metavar="NAME")
    options.add_argument("--machine", default="h200-sxm", help="see `taut machines`")
    given = options.parse_args()

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    print(f"{'':<16}{'bytes saved':>14}{'calls saved':>14}{'prefill':>10}{'float64 error':>16}{'error ratio':>13}")
    for name in given.rewrites:
        plan = taut.plan(model, form="taut", only=[name], machine=given.machine)
        evidence = taut.verify(model, taut.apply(model, plan))
        prices = [price for price in plan.prices if price.workload == "prefill"]
        saved, calls, share = (sum(getattr(p, field) for p in prices) for field in ("bytes", "calls", "share"))
        proof = f"{evidence.float64_error:>16.1e}{evidence.error_ratio:>13.2f}"
        print(f"{name:<16}{saved:>14,.0f}{calls:>14}{-share:>+10.2%}{proof}")


if __name__ == "__main__":
    main()
