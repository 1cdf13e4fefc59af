"""What an operator of torch.library takes and returns in place of one public function."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.rows import acc_dtype

# What torch.library leaves out of the dispatch while an operator's body runs.
_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
# The `when` of a result that is always None.
NEVER = "never"
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A result of a function, in the accumulation's dtype unless it has a `dtype`.

    Attributes:
        like: its shape is that argument's, up to `dims` dimensions; without, it is a scalar.
        when: the argument without which it is None.
        more: the argument that is the size of its last dimension.
        keys: of a result that is a dict of scalars.
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

    Attributes:
        acc: the tensors whose dtypes decide the results'. The first has their device.
        by: the arguments that may get a gradient.
        of: the results that are differentiable.
    """

    function: Callable
    fields: dict[str, Field]
    acc: tuple[str, ...]
    by: tuple[str, ...]
    of: tuple[str, ...]

    @property
    def is_loss(self) -> bool:
        return self.of == ("loss",)

    def arguments(self, signature: inspect.Signature, args: Any, kwargs: Any) -> Arguments:
        """A call's arguments by name, in the order of the signature, as the operator takes them.

        Raises:
            TypeError: one is missing, or unknown.
        """
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = value if name in self.by else value.detach()
            elif self.function.__annotations__[name] == float | Tensor:
                arguments[name] = torch.full((), value, dtype=torch.float64)
        if "inplace_backward" in arguments:
            # A graph's gradient is a tensor of its own.
            arguments["inplace_backward"] = False
        return arguments

    def _nothing(self, arguments: Arguments) -> Tensor:
        """What stands for None."""
        return arguments[self.acc[0]].new_empty(0)

    def fake(self, arguments: Arguments) -> list[Tensor]:
        """Results of the right shapes and dtypes, for a trace."""
        nothing = self._nothing(arguments)
        dtype = acc_dtype(*(arguments[name] for name in self.acc))
        return [
            nothing.new_empty(0)
            if field.absent(arguments)
            else nothing.new_empty(field.shape(arguments), dtype=field.dtype or dtype)
            for field in self.fields.values()
        ]

    def fake_grads(self, arguments: Arguments, needs: Sequence[bool]) -> list[Tensor]:
        """The same of the gradients by the arguments `by`; `needs` says which there are."""
        nothing = self._nothing(arguments)
        wanted = [arguments[name] if need else nothing for name, need in zip(self.by, needs)]
        return [x.new_empty(x.shape) for x in wanted]

    def flat(self, result: Any, arguments: Arguments) -> list[Tensor]:
        """The function's result as tensors that share no memory."""
        nothing = self._nothing(arguments)
        flat = []
        for name, field in self.fields.items():
            value = getattr(result, name, result)
            if field.keys:
                value = torch.stack([value[key] for key in field.keys])
            flat.append((nothing if field.absent(arguments) else value).detach().clone())
        return flat

    def run(
        self, arguments: Arguments, needs: Sequence[bool], upstream: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The function's results and its gradients.

        upstream: the gradients by the results `of`, or 1.
        """
        wanted = [name for name, need in zip(self.by, needs) if need]
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        found: Sequence[Tensor | None] = ()
        with _autograd():
            result = self.function(**arguments | leaves)
            shown = [name for name in self.of if not self.fields[name].absent(arguments)]
            outputs = [getattr(result, name) for name in shown]
            given = upstream and [g for name, g in zip(self.of, upstream) if name in shown]
            if leaves:
                found = torch.autograd.grad(outputs, [*leaves.values()], given, allow_unused=True)
        by_name = {name: self._nothing(arguments) for name in self.by}
        for name, grad in zip(wanted, found):
            # A teacher view that is held constant has none.
            by_name[name] = torch.zeros_like(leaves[name]) if grad is None else grad
        grads = [grad.contiguous() for grad in by_name.values()]
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
