"""Soundness: on random small transformers no rewrite, in any order, changes what the model computes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from judge import SAME, Judge, computed, error
from random_models import NEAR, Model, Spec, example, plain_probes, specs

from taut.plans import plan_and_apply
from taut.proof import prove
from taut.values import Affine

CHUNKS, CHUNK = 20, 500


def examples(count: int):
    """Always the same random models."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    quiet = list(HealthCheck)
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=phases, suppress_health_check=quiet
    )


def check_random_models(count: int, number: int = 0, whole: int = 1) -> None:
    """Sound on every one of them, and not because nothing was done: two in three have a site that is applied."""
    changed: list[bool] = []

    @seed(number)
    @examples(count)
    @given(specs(whole))
    def check(spec: Spec) -> None:
        judge = Judge(Model(spec), example(spec))
        judge.check_all(len(changed))
        changed.append(judge.applied > 0)

    check()
    assert len(changed) >= count / 2
    assert sum(changed) > 2 / 3 * len(changed)


def test_no_rewrite_changes_a_random_model():
    check_random_models(250)


@pytest.mark.parametrize("fact", NEAR)
def test_no_rewrite_looks_through_an_operation_that_breaks_the_fact(fact):
    for spec in plain_probes(fact):
        Judge(Model(spec), example(spec)).check_all()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(1, CHUNKS + 1))
def test_no_rewrite_changes_any_of_ten_thousand_random_models(chunk):
    check_random_models(CHUNK, chunk, whole=3)


def test_the_proof_fails_when_any_rewritten_tensor_is_off_by_a_hundredth():
    failed: list[str] = []

    @examples(15)
    @given(specs())
    def check(spec: Spec) -> None:
        judge = Judge(Model(spec), example(spec))
        _, after = plan_and_apply(judge.lifted, "taut")
        for name in list(after.changed())[:4]:
            wrong = after.copy()
            value = after.values[name]
            wrong.values[name] = Affine(value, 1.01, 0.0 if bool(after.evaluate(name).any()) else 0.01)
            if error(computed(wrong, judge.inputs), judge.true) > 2 * SAME:
                assert not prove(judge.raw, wrong, [judge.inputs], movement=False).passed, name
                failed.append(name)

    check()
    assert len(failed) >= 20
