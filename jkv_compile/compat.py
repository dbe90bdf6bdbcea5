"""Everything private of torch that this package uses, in one place. Checked on torch 2.11 to 2.15."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic as maybe_mark_dynamic
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TORCH_RANGE = ((2, 11), (2, 16))  # [from, to): what the private interfaces below are known for


def check_torch_version() -> None:
    """Once at import. With `JKV_ANY_TORCH=1` a torch that is newer than this file knows is warned of, and tried.

    Raises:
        ImportError: torch is older or newer: what this file imports may work otherwise there, or not be there at all.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, v)) for v in TORCH_RANGE)
    known = f"jkv-compile is known to work with torch >= {low}, < {high}; this is {torch.__version__}"
    if version < TORCH_RANGE[0]:
        raise ImportError(f"{known}. Use `pip install 'torch>={low}'`")
    if version >= TORCH_RANGE[1]:
        if os.environ.get("JKV_ANY_TORCH") != "1":
            raise ImportError(
                f"{known}. Use `pip install 'torch<{high}'` or a newer jkv-compile; JKV_ANY_TORCH=1 tries it as it is"
            )
        import warnings

        warnings.warn(known, stacklevel=3)


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def current_fake_mode() -> FakeTensorMode | None:
    """The fake mode of the graph that Dynamo is handing to a backend."""
    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def never_traced(function: Callable[..., Any]) -> None:
    """Have Dynamo leave a function of ours alone where its guards, rather than the model, are what calls it."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def mark_static(tensor: Tensor) -> None:
    """Tell Dynamo that a tensor keeps its sizes. `torch._dynamo.mark_static` leaves no mark while Dynamo traces."""
    tensor._dynamo_static_indices = set(range(tensor.dim()))  # type: ignore[attr-defined]
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]


def swap_implementation(tensor: Tensor, other: Tensor) -> None:
    """Exchange what two tensor objects are: class and C++ implementation. Attributes set by users stay with the object.

    `torch.utils.swap_tensors` refuses tensors that have weak references, which Dynamo's guards hold.
    """
    tensor.__class__, other.__class__ = other.__class__, tensor.__class__
    torch._C._swap_tensor_impl(tensor, other)
    if torch._dynamo.config.use_recursive_dict_tags_for_guards:  # as in torch 2.11
        _touch_dicts_of(tensor, other)


def _touch_dicts_of(tensor: Tensor, other: Tensor) -> None:
    """Have Dynamo look at a tensor anew: it does not check what is in a dict that nothing was put into since."""
    for holder in gc.get_referrers(tensor):
        if type(holder) is dict:
            for key in [k for k, value in list(holder.items()) if value is tensor]:
                holder[key] = other
                holder[key] = tensor


def storage_key(tensor: Tensor) -> int:
    """Identifies the storage a tensor lives in, for as long as it lives."""
    return tensor.untyped_storage()._cdata


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is one that a transform of `torch.func` (`vmap`, …) sees in place of another."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that transforms of `torch.func` stand in front of; any other as it is."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def storage_holders(tensor: Tensor) -> int:
    """How many tensors hold a plain tensor's storage, the tensor itself among them."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # less the Python object that asks


def only_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view, and what it is a view of is held by nothing else."""
    return tensor._is_view() and _base_references(tensor) == _base_references(torch.empty(2).view(1, 2))


def _base_references(view: Tensor) -> tuple[int, int]:
    """How often the tensor that a view was taken of is held, by Python and by all."""
    base: Any = view._base
    return sys.getrefcount(base), base._use_count()


def compile_inner(
    gm: torch.fx.GraphModule, example_inputs: list[Any], inner: str, mode: str | None, options: dict[str, Any]
):
    """Compile a graph of plain tensors with the backend named `inner`; `mode` and `options` are Inductor's."""
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return _without_guard(aot_eager(gm, example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
    return _without_guard(compile_fx(gm, example_inputs, config_patches=patches or None))


def _without_guard(compiled: Any) -> Any:
    """What `torch._dynamo.disable` wraps: Dynamo wraps all that a backend returns once more, which takes its time."""
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


def records_cuda_graphs(mode: str | None, options: dict[str, Any]) -> bool:
    """Whether Inductor would record CUDA graphs, by `torch.compile`'s `mode` and `options`, or its own config."""
    from torch._inductor import config, list_mode_options

    settings = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
    return bool(settings.get("triton.cudagraphs", config.triton.cudagraphs))


def fake_mode_of(tensor: Tensor) -> FakeTensorMode | None:
    """The fake mode that a fake tensor belongs to; Dynamo's own differs from the one that a backend is to use."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def dynamic_input(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fake tensor for a compiler's example inputs whose size along `dim` may be anything of at least 2."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    mode = current_fake_mode()
    real = torch.empty(shape, dtype=dtype, device=device)
    if mode is None or mode.shape_env is None:
        return real
    sizes = [DimDynamic.DYNAMIC if i == dim else DimDynamic.STATIC for i in range(len(shape))]
    global _dynamic_inputs
    _dynamic_inputs += 1
    source = ConstantSource(f"jkv_active_{_dynamic_inputs}")
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(real, source=source, symbolic_context=context)


_dynamic_inputs = 0


def static_input(tensor: Tensor) -> Tensor:
    """A fake tensor for a compiler's example inputs that has one size in all calls."""
    mode = current_fake_mode()
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def input_like(fake: Tensor) -> Tensor:
    """A contiguous fake tensor for a compiler's example inputs, of the sizes that another has while Dynamo traces."""
    mode = current_fake_mode()
    if mode is None:
        return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
    with mode:
        return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def is_composite(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator is written in terms of others; subclasses meet those whole in inference mode only."""
    return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def own_expression(value: torch.SymInt) -> Any:
    """The expression that a SymInt was made with, before guards equated its symbols with others."""
    return value.node._expr


def as_function(expression: Any, symbols: list[Any]) -> Callable[..., int]:
    """Computes an expression of sizes, which may hold functions of torch's own (`FloorDiv`, …), from its symbols."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
    from torch.utils._sympy.printers import PythonPrinter

    return sympy.lambdify(symbols, expression, modules=[SYMPY_INTERP, "math"], printer=PythonPrinter)


def operator_of(target: Any) -> Any:
    """The operator that `torch.library.custom_op` made, for what it returns; anything else as it is."""
    return target._opoverload if isinstance(target, torch._library.custom_ops.CustomOpDef) else target


def unwrap_compiled(model: Any) -> Any:
    """The module or function that `torch.compile` was given, for what it returned; anything else as it is."""
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        return model._orig_mod
    return getattr(model, "_torchdynamo_orig_callable", model)


def graph_break_of(gm: torch.fx.GraphModule) -> tuple[str, str] | None:
    """(where, why) Dynamo ended a graph before its function did; None where it did not."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    frame = why.user_stack[-1] if why.user_stack else None
    where = "unknown" if frame is None else f"{frame.filename}:{frame.lineno} {frame.name}"
    return where, why.reason.strip().splitlines()[0]


def weak_view(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Gives a plain tensor's memory as a tensor, while it lives; does not count among its holders until then."""
    from torch.multiprocessing.reductions import StorageWeakRef

    storage = StorageWeakRef(tensor.untyped_storage())
    size, stride, offset, dtype = tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype
    device, inference = tensor.device, tensor.is_inference()

    def view() -> Tensor | None:
        memory = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        if memory is None:
            return None
        with torch.inference_mode(inference):
            return torch.empty(0, dtype=dtype, device=device).set_(memory, offset, size, stride)

    return view


def refuse_unknown_sizes(operator: torch._ops.OpOverload, arguments: Any) -> None:
    """Have Dynamo break the graph where a number among the arguments is known to the data only.

    It could not tell where the size of a subclass comes from then (2.13), and would stop compiling with an error.
    """
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    if any(isinstance(a, torch.SymInt) and not a.node.has_hint() for a in arguments):
        raise DynamicOutputShapeException(operator)


def register_for_subclass(operator: Any, subclass: type, fake: Callable[..., Any], eager: Callable[..., Any]) -> None:
    """Have a higher-order operator call `fake(operator, *args)`, or `eager`, where an argument is of a tensor subclass.

    Their own rule for fake tensors refuses subclasses before a rule of the subclass is asked for, so it is wrapped.
    """
    from torch.utils._pytree import tree_leaves

    known = operator.python_key_table[FakeTensorMode]

    def traced(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, subclass) for a in tree_leaves(args)):
            with mode:
                return fake(operator, *args, **kwargs)
        return known(mode, *args, **kwargs)

    operator.python_key_table[FakeTensorMode] = traced
    operator.py_impl(subclass)(lambda *args, **kwargs: eager(operator, *args, **kwargs))


def default_store() -> Any:
    """The key-value store that the ranks of the default process group share."""
    return torch.distributed.distributed_c10d._get_default_store()


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Every rank's tensor, stacked; in a compiled graph, a collective of its own."""
    from torch.distributed import _functional_collectives as collectives

    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor  # before torch 2.13
    return gather(tensor.contiguous().unsqueeze(0), 0, group)


def exchanged(tensor: Tensor, group: Any) -> Tensor:
    """`tensor[i]` of this rank goes to rank i; the result's i-th came from there. A collective of its own, likewise."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.all_to_all_single(tensor.contiguous(), None, None, group)


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor; does not import what it takes to make one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)
