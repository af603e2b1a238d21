"""Random small transformers as plain modules, for hypothesis: what a model is drawn from, and the model."""

from random_models.model import Model, example
from random_models.spec import Spec
from random_models.strategies import NEAR, plain_probes, specs

__all__ = ["NEAR", "Model", "Spec", "example", "plain_probes", "specs"]
