"""An op: one function of tensors. Its body is the plain reference; faster implementations may be attached to it.

An implementation's `when` answers None ("I can run this call") or the reason why it cannot, in words. Calling an op
takes the fastest implementation that fits, else the reference; calling it with `impl=` runs that one or raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from inspect import Parameter as Argument
from inspect import signature
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

Reason = str | None
PLAIN = Tensor, Parameter
NUMBERS = {float: "float", int: "SymInt", bool: "bool", str: "str"}


@dataclass(frozen=True)
class Work:
    """What a call must do at the least: `flops` operations, and `bytes` read once and written once."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Impl(NamedTuple):
    name: str
    when: Callable[..., Reason]
    run: Callable[..., Any]
    traced: Callable[..., Any]
    """What a tracer sees: `run`, or a custom op."""


@dataclass(eq=False)
class Op:
    """A reference function with its implementations, its least work and its test cases, all declared beside it."""

    reference: Callable[..., Any]
    impls: list[Impl] = field(default_factory=list)
    work: Callable[..., Work] | None = None
    cases: Callable[..., Iterable[tuple[tuple, dict]]] | None = None

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.reference)

    @property
    def name(self) -> str:
        return self.reference.__name__

    def impl(self, name: str, *, when: Callable[..., Reason], opaque: bool = False):
        """Attach a faster implementation; the one attached last is tried first.

        `opaque` says that it is no torch code: a traced program then holds it as one custom op, `taut::<op>_<name>`, of
        the reference's arguments.
        """

        def attach(run: Callable[..., Any]):
            traced = _custom(f"taut::{self.name}_{name}", run, self.reference) if opaque else run
            self.impls.insert(0, Impl(name, when, run, traced))
            return run

        return attach

    def least(self, work: Callable[..., Work]) -> Callable[..., Work]:
        """Declare the least work of a call: same arguments as the op (meta tensors will do), returns Work."""
        self.work = work
        return work

    def tests(self, cases: Callable[..., Iterable[tuple[tuple, dict]]]):
        """Declare test inputs: `cases(make)` yields (args, kwargs); `make(*shape)` gives a random tensor."""
        self.cases = cases
        return cases

    def __call__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> Any:
        if impl is not None:
            return self._by_name(impl, args, kwargs)
        for candidate in self.impls:
            if candidate.when(*args, **kwargs) is None:
                return _run(candidate, args, kwargs)
        return self.reference(*args, **kwargs)

    def _by_name(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name == "reference":
            return self.reference(*args, **kwargs)
        for candidate in self.impls:
            if candidate.name == name:
                reason = candidate.when(*args, **kwargs)
                if reason is not None:
                    raise RuntimeError(f"{self.name}: {name} cannot run this call: {reason}")
                return _run(candidate, args, kwargs)
        known = ", ".join([i.name for i in self.impls] + ["reference"])
        raise KeyError(f"{self.name} has no implementation {name!r}; it has {known}")

    def explain(self, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Why each implementation would or would not run this call, in the order in which they are tried."""
        verdicts = [(i.name, i.when(*args, **kwargs)) for i in self.impls]
        return [(name, reason or "fits") for name, reason in verdicts] + [("reference", "always fits")]

    def __repr__(self) -> str:
        return f"op {self.name}"


def _run(impl: Impl, args: tuple, kwargs: dict) -> Any:
    """Run an implementation, or let a tracer see it."""
    first = args[0] if args else next(iter(kwargs.values()))
    direct = type(first) in PLAIN and not is_compiling()
    return (impl.run if direct else impl.traced)(*args, **kwargs)


def _custom(name: str, run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as a custom op with the reference's arguments and shapes."""
    custom = torch.library.custom_op(name, run, mutates_args=(), schema=_schema(reference))
    custom.register_fake(lambda *args, **kwargs: tree_map_only(Tensor, _dense, reference(*args, **kwargs)))
    return custom


def _schema(function: Callable[..., Any]) -> str:
    """Arguments and results of a function in the words of torch's dispatcher, from its annotations."""
    hints = get_type_hints(function)
    given = [_argument(p, hints[name]) for name, p in signature(function).parameters.items()]
    back = get_args(hints["return"]) if get_origin(hints["return"]) is tuple else ()
    return f"({', '.join(given)}) -> {'(' + ', '.join('Tensor' for _ in back) + ')' if back else 'Tensor'}"


def _argument(parameter: Argument, hint: Any) -> str:
    """A number that may also be a tensor is a number: the tensor goes to the reference."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    number = next((NUMBERS[kind] for kind in kinds if kind in NUMBERS), "Tensor")
    optional = "?" if type(None) in kinds else ""
    default = parameter.default
    text = f'"{default}"' if isinstance(default, str) else str(default)
    return f"{number}{optional} {parameter.name}" + ("" if default is parameter.empty else f"={text}")


def _dense(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def op(reference: Callable[..., Any]) -> Op:
    """Make a function an op; its body becomes the reference."""
    return Op(reference)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors, each counted once."""
    return sum([t.nbytes for t in tensors if t is not None])
