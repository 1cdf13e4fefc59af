"""The public functions under torch.compile: operators of torch.library, at which no graph breaks.

A traced call of a function runs operator onstream::NAME, whose body is the function itself, its
checks included. The operator of a loss makes the gradients with it, as the one-shot losses do
anyway. Log-probs take any upstream gradient, so onstream::NAME_backward makes them once more. An
operator returns tensors only: an empty one stands for None.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.rows import acc_dtype

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
_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
# The `when` of a result that is always None.
NEVER = "never"
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A result of a function, of the shape of the argument `like`, up to `dims` dimensions.

    when: the argument without which it is None. more: the argument that is its last dimension.
    dtype: unless it is the accumulation's. keys: of a result that is a dict of scalars.
    """

    like: str = ""
    dims: int | None = 1
    when: str = ""
    more: str = ""
    dtype: torch.dtype | None = None
    keys: tuple[str, ...] = ()

    def absent(self, arguments: Arguments) -> bool:
        given = arguments.get(self.when) if self.when else True
        return given is None or given is False

    def shape(self, arguments: Arguments) -> tuple[int, ...]:
        if self.keys:
            return (len(self.keys),)
        shape = arguments[self.like].shape[: self.dims] if self.like else ()
        return (*shape, arguments[self.more]) if self.more else tuple(shape)


@dataclass(frozen=True)
class Traced:
    """One function as an operator.

    acc: the tensors whose dtypes decide the results'. by: the arguments that may get a gradient.
    of: the results that are differentiable.
    """

    function: Callable
    fields: dict[str, Field]
    acc: tuple[str, ...]
    by: tuple[str, ...]
    of: tuple[str, ...]

    @property
    def defaults(self) -> Arguments:
        parameters = inspect.signature(self.function).parameters
        return {name: p.default for name, p in parameters.items()}

    @property
    def is_loss(self) -> bool:
        return self.of == ("loss",)

    def _dtype(self, arguments: Arguments) -> torch.dtype:
        return acc_dtype(*(arguments[name] for name in self.acc))

    def fake(self, arguments: Arguments) -> list[Tensor]:
        """Results of the right shapes and dtypes, for a trace."""
        like, dtype = arguments[self.acc[0]], self._dtype(arguments)
        return [
            like.new_empty(0 if f.absent(arguments) else f.shape(arguments), dtype=f.dtype or dtype)
            for f in self.fields.values()
        ]

    def fake_grads(self, arguments: Arguments, needs: Sequence[bool]) -> list[Tensor]:
        """The same of the gradients by the arguments `by`; `needs` says which there are."""
        return [
            arguments[name].new_empty(arguments[name].shape)
            if need
            else arguments[self.acc[0]].new_empty(0)
            for name, need in zip(self.by, needs)
        ]

    def flat(self, result: Any, arguments: Arguments) -> list[Tensor]:
        """The function's result as tensors that share no memory."""
        flat = []
        for (name, field), empty in zip(self.fields.items(), self.fake(arguments)):
            value = getattr(result, name, result)
            if field.absent(arguments):
                value = empty
            elif field.keys:
                value = torch.stack([value[key] for key in field.keys])
            flat.append(value.detach().clone())
        return flat

    def run(
        self, arguments: Arguments, needs: Sequence[bool], upstream: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The function's results and its gradients; upstream: those by the results `of`, or 1."""
        leaves = {
            name: arguments[name].detach().requires_grad_()
            for name, need in zip(self.by, needs)
            if need
        }
        with _autograd():
            result = self.function(**arguments | leaves)
            shown = [name for name in self.of if not self.fields[name].absent(arguments)]
            outputs = [getattr(result, name) for name in shown]
            given = upstream and [g for name, g in zip(self.of, upstream) if name in shown]
            found = ()
            if leaves:
                found = torch.autograd.grad(outputs, [*leaves.values()], given, allow_unused=True)
        grads = self.fake_grads(arguments, needs)
        for i, grad in zip([i for i, need in enumerate(needs) if need], found):
            # A teacher view that is held constant has none.
            grads[i] = torch.zeros_like(grads[i]) if grad is None else grad.contiguous()
        return self.flat(result, arguments), grads

    def named(self, flat: Sequence[Tensor], arguments: Arguments) -> Any:
        """What the function returns, of its operator's results."""
        values: list[Any] = []
        for (name, field), value in zip(self.fields.items(), flat):
            value = value if name in self.of else value.detach()
            if field.absent(arguments):
                values.append(None)
            else:
                values.append(dict(zip(field.keys, value.unbind())) if field.keys else value)
        made = self.function.__annotations__["return"]
        return values[0] if made is Tensor else made(*values)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """An operator's body runs below autograd; here it is on again."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def traceable(
    fields: dict[str, Field], acc: Sequence[str], by: Sequence[str] = (), of: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Decorate a public function whose traced calls are operators; see `Traced`."""

    def decorate(function: Callable) -> Callable:
        traced = Traced(function, fields, tuple(acc), tuple(by), tuple(of))
        defaults, operator = traced.defaults, _operator(traced)
        annotations = function.__annotations__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            arguments = _bound(function.__name__, defaults, args, kwargs)
            for name, value in arguments.items():
                if annotations[name] == float | Tensor and not isinstance(value, Tensor):
                    arguments[name] = torch.full((), value, dtype=torch.float64)
            needs = [
                torch.is_grad_enabled() and x is not None and x.requires_grad
                for x in [arguments[name] for name in by]
            ]
            return traced.named(operator(*arguments.values(), needs), arguments)

        return call

    return decorate


def _bound(name: str, defaults: Arguments, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """All arguments by name, in the order of the signature."""
    given = {**dict(zip(defaults, args)), **kwargs}
    unknown = [key for key in given if key not in defaults]
    arguments = {key: given.get(key, default) for key, default in defaults.items()}
    missing = [key for key, value in arguments.items() if value is inspect.Parameter.empty]
    if unknown or missing:
        raise TypeError(f"{name}() misses arguments {missing} and does not know {unknown}")
    if "inplace_backward" in arguments:
        # A graph's gradient is a tensor of its own.
        arguments["inplace_backward"] = False
    return arguments


def _operator(traced: Traced) -> Callable:
    """Register a function: its body, its shapes for a trace, its gradients."""
    names = list(traced.defaults)
    label = f"onstream::{traced.function.__name__}"
    annotations = traced.function.__annotations__
    taken = ", ".join(f"{_TYPES[annotations[name]]} {name}" for name in names)
    taken = f"{taken}, bool[] needs"

    def forward(*values: Any) -> Any:
        arguments, needs = dict(zip(names, values)), values[-1]
        if traced.is_loss:
            flat, grads = traced.run(arguments, needs)
            return _several([*flat, *grads])
        with torch.no_grad():
            return _several(traced.flat(traced.function(**arguments), arguments))

    def fake(*values: Any) -> Any:
        arguments, needs = dict(zip(names, values)), values[-1]
        grads = traced.fake_grads(arguments, needs) if traced.is_loss else []
        return _several([*traced.fake(arguments), *grads])

    count = len(traced.fields) + (len(traced.by) if traced.is_loss else 0)
    schema = f"({taken}) -> {_tensors(count)}"
    operator = torch.library.custom_op(label, forward, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if traced.is_loss:
        _register_loss(operator, names, traced)
    elif traced.by:
        _register_values(operator, label, taken, names, traced)
    if count > 1:
        return operator
    return lambda *values: (operator(*values),)


def _several(tensors: list[Tensor]) -> Any:
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})" if count > 1 else "Tensor"


def _by_argument(names: list[str], traced: Traced, grads: Sequence[Tensor], needs: Any) -> tuple:
    """The gradients in the order of the operator's arguments, of which `needs` is the last."""
    found = {name: g for name, g, need in zip(traced.by, grads, needs) if need}
    return (*(found.get(name) for name in names), None)


def _register_loss(operator: Any, names: list[str], traced: Traced) -> None:
    """The gradients are results of the forward."""

    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*output[len(traced.fields) :])
        ctx.needs = inputs[-1]

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        grads = [(g * upstream).to(g.dtype) for g in ctx.saved_tensors]
        return _by_argument(names, traced, grads, ctx.needs)

    operator.register_autograd(backward, setup_context=setup)


def _register_values(
    operator: Any, label: str, taken: str, names: list[str], traced: Traced
) -> None:
    """The gradients come from an operator of their own."""

    def gradients(*values: Any) -> Any:
        *values, needs, upstream = values
        return _several(traced.run(dict(zip(names, values)), needs, upstream)[1])

    def fake(*values: Any) -> Any:
        *values, needs, _ = values
        return _several(traced.fake_grads(dict(zip(names, values)), needs))

    schema = f"({taken}, Tensor[] upstream) -> {_tensors(len(traced.by))}"
    of_it = torch.library.custom_op(f"{label}_backward", gradients, mutates_args=(), schema=schema)
    of_it.register_fake(fake)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors)
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        inputs = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.rest)]
        by_name = dict(zip(traced.fields, upstream))
        grads = of_it(*inputs, [by_name[name].contiguous() for name in traced.of])
        grads = grads if len(traced.by) > 1 else (grads,)
        return _by_argument(names, traced, grads, inputs[-1])

    operator.register_autograd(backward, setup_context=setup)
