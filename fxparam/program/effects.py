"""What executing a node does besides computing its value.

A node is *pure* only if it is recognised as such; everything else is assumed to write all it is given, to be random, and to
alias its inputs. The knowledge comes from the schemas of ATen operators (mutability, aliasing, seeded randomness), extended
to the Python functions and methods that share an operator's name, and from two short tables for what has no schema.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxparam.program.program import deliver


@dataclass(frozen=True)
class Effect:
    """What a node does.

    Attributes:
        known: whether the node is recognised at all.
        random: its value is drawn anew at each execution.
        writes: the inputs it may write to.
        aliases: whether its value may share memory with an input.
    """

    known: bool = True
    random: bool = False
    writes: tuple[fx.Node, ...] = ()
    aliases: bool = False

    @property
    def pure(self) -> bool:
        """Whether executing the node twice, or earlier, or not at all, changes nothing but its value."""
        return self.known and not self.random and not self.writes


# Functions of torch.nn.functional written in Python: composites of pure operators, apart from the options checked below.
_FUNCTIONAL = frozenset(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d affine_grid avg_pool1d avg_pool2d avg_pool3d bilinear binary_cross_entropy
    binary_cross_entropy_with_logits celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_similarity cross_entropy ctc_loss elu embedding fold gelu glu grid_sample group_norm hardshrink hardsigmoid
    hardswish hardtanh huber_loss interpolate kl_div l1_loss layer_norm leaky_relu linear log_softmax logsigmoid lp_pool1d
    lp_pool2d max_pool1d max_pool2d max_pool3d mish mse_loss nll_loss normalize one_hot pad pairwise_distance pdist
    pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 rms_norm selu sigmoid silu smooth_l1_loss softmax softmin
    softplus softshrink softsign tanh tanhshrink threshold triplet_margin_loss unfold upsample""".split()
)
# Tensor methods and attributes that have no operator of their own name.
_READS = frozenset(
    "shape dtype device ndim itemsize nbytes layout requires_grad is_cuda is_leaf dim size stride numel nelement".split()
)
_ALIASING = frozenset(
    """T mT H mH data real imag float double half bfloat16 int long short bool char byte cpu cuda to type type_as contiguous
    reshape_as view_as expand_as view reshape detach getitem""".split()
)
_OPERATORS = frozenset(
    getattr(operator, name)
    for name in """add sub mul truediv floordiv mod pow matmul neg pos abs invert and_ or_ xor lshift rshift
    eq ne lt le gt ge""".split()
)
_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem".split()
)
# Operators whose schema hides an effect: running statistics that are written, dropout inside a recurrence.
_MISLEADING = (
    "batch_norm",
    "instance_norm",
    "lstm",
    "gru",
    "rnn_",
    "fake_quant",
    "rrelu",
    "embedding_bag",
    "moving_avg",
)
_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_RECURRENCES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_UNKNOWN_METHODS = frozenset(
    "numpy tolist item grad grad_fn register_hook backward retain_grad requires_grad_ set_ data_ptr".split()
)


def effect_of(node: fx.Node, module: nn.Module | None = None) -> Effect:
    """The effect of a node; ``module`` is the target of a ``call_module`` node."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Effect()
    if node.op == "call_module":
        return _module_effect(node, module)
    if "out" in node.kwargs and node.kwargs["out"] is not None:
        return Effect(known=False, writes=tuple(node.all_input_nodes), aliases=True)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _schema_effect(node, target)
    if node.op == "call_method":
        return _method_effect(node, str(target))
    if target is deliver:
        return Effect(known=False)
    if target is getattr:
        return _method_effect(node, str(node.args[1]))
    return _function_effect(node, target)


def _unknown(node: fx.Node) -> Effect:
    return Effect(known=False, random=True, writes=tuple(node.all_input_nodes), aliases=True)


def _module_effect(node: fx.Node, module: nn.Module | None) -> Effect:
    if type(module).__name__ == "GuardsFn":
        # What torch.export put in front of a graph to check the shapes of the inputs.
        return Effect(known=False)
    # A module of torch.nn writes to its inputs only where it says so; its own state and randomness keep it in its place.
    if type(module).__module__.startswith("torch.nn.") and not getattr(module, "inplace", False):
        return Effect(known=False, random=True, aliases=True)
    return _unknown(node)


def _schema_effect(node: fx.Node, target: torch._ops.OpOverload) -> Effect:
    schema = target._schema
    name = schema.name.removeprefix("aten::")
    named = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    if name in ("batch_norm", "instance_norm"):
        active = named.get("training", named.get("use_input_stats")) is not False
        statistics = (named.get("running_mean"), named.get("running_var"))
        return Effect(writes=tuple(one for one in statistics if isinstance(one, fx.Node)) if active else ())
    if name in _RECURRENCES:
        return _recurrence_effect(still=named.get("train") is False or named.get("dropout") == 0.0)
    if _misleading(name):
        return _unknown(node)
    writes = [
        named[argument.name]
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named
    ]
    still = named.get("train") is False or ("dropout_p" in (a.name for a in schema.arguments) and not named.get("dropout_p"))
    return Effect(
        known=target.namespace in ("aten", "prims", "prim"),
        random=torch.Tag.nondeterministic_seeded in target.tags and not still,
        writes=tuple(value for value in writes if isinstance(value, fx.Node)),
        # Dropout that does nothing may return what it is given.
        aliases=still
        or any(result.alias_info is not None for result in schema.returns)
        or target.namespace not in ("aten", "prims"),
    )


def _recurrence_effect(*, still: object) -> Effect:
    """Dropout between the layers of a recurrence is random; its weights are only read."""
    return Effect() if still else Effect(known=False, random=True)


def _method_effect(node: fx.Node, name: str) -> Effect:
    if name in _READS:
        return Effect()
    if name in _ALIASING:
        return Effect(aliases=True)
    if name in _UNKNOWN_METHODS:
        return _unknown(node)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return (
            Effect(aliases=name == "getitem")
            if hasattr(operator, name) and not name.startswith(("i", "set", "del"))
            else _unknown(node)
        )
    known, random, writes, aliases = _packet(name)
    if not known:
        return _unknown(node)
    first = node.args[0] if node.args else None
    return Effect(random=random, writes=(first,) if writes and isinstance(first, fx.Node) else (), aliases=aliases)


def _function_effect(node: fx.Node, target: Any) -> Effect:
    if target in _OPERATORS or getattr(target, "__module__", None) == math.__name__:
        return Effect()
    if target is operator.getitem:
        return Effect(aliases=True)
    if target in _IN_PLACE:
        first = node.args[0]
        return Effect(writes=(first,) if isinstance(first, fx.Node) else (), aliases=True)
    name = getattr(target, "__name__", "")
    if getattr(F, name, None) is target and not isinstance(target, type):
        return _functional_effect(node, name)
    home = getattr(target, "__module__", None) or ""
    if (
        getattr(torch, name, None) is target
        or home.startswith(("torch._C", "torch.linalg", "torch.fft", "torch.special", "torch.functional"))
        or _is_builtin(target)
    ):
        if name == "tensor":
            return Effect()
        if name in _RECURRENCES:
            return _recurrence_effect(still=False)
        known, random, writes, aliases = _packet(name)
        first = node.args[0] if node.args else None
        if known:
            return Effect(random=random, writes=(first,) if writes and isinstance(first, fx.Node) else (), aliases=aliases)
    return _unknown(node)


def _functional_effect(node: fx.Node, name: str) -> Effect:
    options = dict(node.kwargs)
    first = node.args[0] if node.args else options.get("input")
    if name.endswith("_") or options.get("inplace"):
        return Effect(writes=(first,) if isinstance(first, fx.Node) else tuple(node.all_input_nodes), aliases=True)
    if name in _FUNCTIONAL:
        # Positional options could hide max_norm (which writes) or inplace: only tensors and shapes are passed by position here.
        if name == "embedding" and (options.get("max_norm") is not None or len(node.args) > 3):
            return _unknown(node)
        if any(value is True for value in node.args):
            return Effect(known=False, writes=tuple(node.all_input_nodes), aliases=True)
        return Effect(aliases=name in ("pad", "interpolate", "upsample"))
    if "dropout" in name:
        training = node.args[2] if len(node.args) > 2 else options.get("training", True)
        return Effect(random=training is not False, aliases=True)
    if name in ("batch_norm", "instance_norm"):
        return _norm_effect(node, name)
    if name == "multi_head_attention_forward":
        return Effect(random=True)
    if name == "scaled_dot_product_attention":
        return Effect(random=bool(options.get("dropout_p", 0.0)) or len(node.args) > 4)
    known, random, writes, aliases = _packet(name)
    if not known or writes or random or getattr(F, name) is not getattr(torch._C._nn, name, getattr(torch, name, None)):
        return _unknown(node)
    return Effect(aliases=aliases)


def is_pure_operator(name: str) -> bool:
    """Whether the ATen operators of this name compute and do nothing else."""
    known, random, writes, _ = _packet(name)
    return known and not random and not writes


def _norm_effect(node: fx.Node, name: str) -> Effect:
    """Running statistics are written where the statistics of the input are used; the schemas do not say so."""
    at, option, default = (5, "training", False) if name == "batch_norm" else (5, "use_input_stats", True)
    given = node.args[at] if len(node.args) > at else node.kwargs.get(option, default)
    statistics = (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
    return Effect(writes=tuple(one for one in statistics if isinstance(one, fx.Node)) if given is not False else ())


@cache
def _packet(name: str) -> tuple[bool, bool, bool, bool]:
    """(known, random, writes its first argument, may alias) for the ATen operators of one name, over all overloads."""
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    if not isinstance(packet, torch._ops.OpOverloadPacket) or _misleading(name):
        return False, True, True, True
    # Overloads with out= are told apart by their keyword, which effect_of has looked at already.
    overloads = [
        op for op in (getattr(packet, key) for key in packet.overloads()) if not any(a.is_out for a in op._schema.arguments)
    ]
    if not overloads:
        return False, True, True, True
    return (
        True,
        any(torch.Tag.nondeterministic_seeded in op.tags for op in overloads),
        any(op._schema.is_mutable for op in overloads),
        any(result.alias_info is not None for op in overloads for result in op._schema.returns) or name in _ALIASING,
    )


def _misleading(name: str) -> bool:
    return name not in _CELLS and any(word in name for word in _MISLEADING)


def _is_builtin(target: Any) -> bool:
    return type(target).__name__ == "builtin_function_or_method" and type(getattr(target, "__self__", None)).__name__ in (
        "type",
        "module",
    )
