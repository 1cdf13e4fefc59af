"""The public functions under torch.compile: operators of torch.library, at which no graph breaks.

A traced call of a function runs the operator onstream::NAME. Its body is the function itself, with
its checks. A loss is a scalar, so its operator makes the gradients too, as the one-shot losses do
anyway. Log-probs take any upstream gradient: onstream::NAME_backward makes them once more for it.
An operator returns a list of tensors. An empty one stands for None.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kernels.traced import Field, Traced

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    # A number travels as a 0-dim float64 tensor, which computes alike.
    float | Tensor: "Tensor",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
    str | None: "str?",
}
P = ParamSpec("P")
R = TypeVar("R")


def traceable(
    fields: dict[str, Field], acc: Sequence[str], by: Sequence[str] = (), of: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function whose traced calls are operators; see `Traced`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        traced = Traced(function, fields, tuple(acc), tuple(by), tuple(of))
        signature, operator = inspect.signature(function), _operator(traced)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            arguments = traced.arguments(signature, args, kwargs)
            enabled = torch.is_grad_enabled()
            values = [arguments[name] for name in traced.by]
            needs = [enabled and x is not None and x.requires_grad for x in values]
            return traced.named(operator(*arguments.values(), needs), arguments)

        return call

    return decorate


def _define(name: str, body: Callable, fake: Callable, taken: str) -> Any:
    """A new operator, which changes none of its arguments."""
    operator = torch.library.custom_op(
        f"onstream::{name}",
        body,
        mutates_args=(),
        schema=f"({taken}) -> Tensor[]",
        # To find the unmasked rows it waits for the device, which a captured graph cannot.
        tags=(torch.Tag.cudagraph_unsafe,),
    )
    operator.register_fake(fake)
    return operator


def _operator(traced: Traced) -> Callable:
    """Register a function: its body, its shapes for a trace, its gradients."""
    name, parameters = traced.function.__name__, inspect.signature(traced.function).parameters
    taken = ", ".join(f"{_TYPES[p.annotation]} {p.name}" for p in parameters.values())
    taken = f"{taken}, bool[] needs"

    def body(*values: Any) -> list[Tensor]:
        arguments, needs = dict(zip(parameters, values)), values[-1]
        if traced.is_loss:
            flat, grads = traced.run(arguments, needs)
            return [*flat, *grads]
        with torch.no_grad():
            return traced.flat(traced.function(**arguments), arguments)

    def fake(*values: Any) -> list[Tensor]:
        arguments, needs = dict(zip(parameters, values)), values[-1]
        grads = traced.fake_grads(arguments, needs) if traced.is_loss else []
        return [*traced.fake(arguments), *grads]

    operator = _define(name, body, fake, taken)
    names = list(parameters)
    if traced.is_loss:
        _differentiate_loss(operator, names, traced)
    elif traced.by:
        _differentiate_values(operator, f"{name}_backward", taken, names, traced)
    return operator


def _by_argument(
    names: list[str], traced: Traced, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the operator's arguments, of which `needs` is the last."""
    found = {name: g for name, g, need in zip(traced.by, grads, needs) if need}
    return (*(found.get(name) for name in names), None)


def _differentiate_loss(operator: Any, names: list[str], traced: Traced) -> None:
    """The gradients are results of the forward."""

    def setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.save_for_backward(*output[len(traced.fields) :])
        ctx.needs = inputs[-1]

    def backward(ctx: Any, upstream: list[Tensor]) -> tuple[Tensor | None, ...]:
        by_loss = upstream[list(traced.fields).index("loss")]
        grads = [(g * by_loss).to(g.dtype) for g in ctx.saved_tensors]
        return _by_argument(names, traced, grads, ctx.needs)

    operator.register_autograd(backward, setup_context=setup)


def _differentiate_values(
    operator: Any, name: str, taken: str, names: list[str], traced: Traced
) -> None:
    """The gradients come from an operator of their own."""

    def body(*values: Any) -> list[Tensor]:
        *inputs, needs, upstream = values
        return traced.run(dict(zip(names, inputs)), needs, upstream)[1]

    def fake(*values: Any) -> list[Tensor]:
        *inputs, needs, _ = values
        return traced.fake_grads(dict(zip(names, inputs)), needs)

    gradients = _define(name, body, fake, f"{taken}, Tensor[] upstream")

    def setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, upstream: list[Tensor]) -> tuple[Tensor | None, ...]:
        inputs = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.others)]
        by_name = dict(zip(traced.fields, upstream))
        grads = gradients(*inputs, [by_name[name].contiguous() for name in traced.of])
        return _by_argument(names, traced, grads, inputs[-1])

    operator.register_autograd(backward, setup_context=setup)
