"""``ParametrizedModule``: what ``transform`` returns and a training script holds.

It wraps the live module tree and shares its registries (``_parameters``, ``_buffers``, ``_modules`` are the same
dictionaries), so that names, ``state_dict``, ``to`` and ``train`` are those of the user's model, while the user's own code
keeps running on an instance of the user's own class: no attribute of ours can shadow one of theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxparam.program import Site
from fxparam.runtime.checkpoints import Checkpoints
from fxparam.runtime.replicas import ReplicaRuntime
from fxparam.runtime.report import Report, make_report
from fxparam.runtime.runtime import Runtime
from fxparam.runtime.stats import Stats
from fxparam.runtime.weights import WeightAccess

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""What the wrapper and the live root have in common, as the same objects."""


class ParametrizedModule(WeightAccess, nn.Module):
    """A model whose declared weights are computed once per optimizer step. Made by ``fxparam.transform``.

    Calling it, moving it, saving it and reading attributes of the user's model through it work as on the model itself.
    """

    def __init__(
        self,
        live: nn.Module,
        sites: Sequence[Site],
        *,
        trace: bool,
        record: str,
        why_live: str,
        legacy: Mapping[str, str],
        example_inputs: Any,
        recompute: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        state = self.__dict__
        state["_fxp_live"], state["_fxp_sites"] = live, tuple(sites)
        state["_fxp_options"] = {
            "trace": trace,
            "record": record,
            "why_live": why_live,
            "legacy": dict(legacy),
            "recompute": recompute,
        }
        state["_fxp_example_inputs"] = example_inputs
        self._attach()

    def _attach(self) -> None:
        """Share the live tree's registries and make a runtime for it."""
        state, live = self.__dict__, self.__dict__["_fxp_live"]
        for registry in _SHARED:
            state[registry] = live.__dict__[registry]
        state["training"] = live.training
        options = state["_fxp_options"]
        state["_fxp_runtime"] = Runtime(
            live,
            state["_fxp_sites"],
            trace=options["trace"],
            why_live=options["why_live"],
            recompute=options["recompute"],
            record=options["record"],
        )
        state["_fxp_inline"], state["_fxp_compiled"] = state["_fxp_runtime"].inline, None
        state["_fxp_checkpoints"] = Checkpoints(live, self._fxp_sites, options["legacy"])

    # --- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's model computes."""
        if torch.compiler.is_compiling():
            return self._with_values(self._fxp_live, self._fxp_runtime.compute_all(), args, kwargs)
        with self._fxp_runtime.forward() as plan:
            given = None if plan is None else plan.arguments(args, kwargs)
            if plan is None:
                return self._fxp_live(*args, **kwargs)
            if self._fxp_compiled is not None:
                values = self._fxp_runtime.read_all(plan)
                if given is None:
                    return self._fxp_compiled(self._fxp_live, values, args, kwargs)
                return self._fxp_compiled(plan.body, values, given, {})
            if plan.body is not None and given is not None:
                return plan.body(*given)
            return self._fxp_runtime.regions.call(plan, args, kwargs)

    def _with_values(self, run: Any, values: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        inline = self._fxp_inline
        inline.values = values
        try:
            return run(*args, **kwargs)
        finally:
            inline.values = None

    def compile(self, *args: Any, prologue: bool = False, **kwargs: Any) -> None:
        """Compile the body; weights stay cached and are computed once per optimizer step. The way to compile a model.

        ``torch.compile(model)`` computes the weights inside its graph instead, at each forward.

        Args:
            *args: as for ``torch.compile``.
            prologue: compile the computation of the weights as well, apart from the body. Pays where it consists of many small
                operations; PyTorch has no second derivatives of compiled functions.
            **kwargs: as for ``torch.compile``.
        """
        self.__dict__["_fxp_compiled"] = torch.compile(self._with_values, *args, **kwargs)
        self._fxp_runtime.compile_prologue((lambda module: torch.compile(module, *args, **kwargs)) if prologue else None)

    def defer_backward(self) -> AbstractContextManager[None]:
        """Inside the block, backward stops at the weights; leaving it sends the sum of all gradients through the prologue.

        Put all micro-batches of a step inside, and clipping, unscaling and ``optimizer.step()`` after it:

            with model.defer_backward():
                for x in micro_batches:
                    model(x).backward()
            optimizer.step()

        An exception discards the sums, and so does ``model.zero_grad()``. Blocks of other threads and nested blocks are
        separate. Under ``DistributedDataParallel`` run all but the last micro-batch under ``no_sync()``, all inside.

        Raises:
            DeferralError: the latents are sharded (FSDP2); later: ``optimizer.step()`` inside the block, or a backward with
                ``create_graph=True``.
        """
        return self._fxp_runtime.defer_backward()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget those that ``defer_backward`` still holds."""
        self._fxp_runtime.discard_deferred()
        super().zero_grad(set_to_none)

    def train(self, mode: bool = True) -> ParametrizedModule:
        """Training or eval mode, for the whole model."""
        if mode != self.training:
            # Now, and not at the next read: other weights may be swapped in and out again without one in this mode.
            self._fxp_runtime.drop_entries()
        self._fxp_live.train(mode)
        self.__dict__["training"] = self._fxp_live.training
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ParametrizedModule:
        # An entry holds graph edges to the latents; swapping parameters would be refused while it lives.
        self._fxp_runtime.drop_entries()
        self._fxp_live._apply(fn, recurse)
        return self

    def apply(self, fn: Any) -> ParametrizedModule:
        """Apply a function to every module of the user's model."""
        self._fxp_live.apply(fn)
        return self

    # --- state, by the live root's own methods: the user's class may override them

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state under the names of ``torch.nn.utils.parametrize``."""
        return self._fxp_live.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state of this model, of the same model under ``torch.nn.utils.parametrize``, of the plain model
        (through the right inverses), or of the legacy hooks.

        Raises:
            ImageError: a plain weight is not in the image of its parametrization; nothing was loaded.
        """
        return self._fxp_live.load_state_dict(self._fxp_checkpoints.translated(state_dict), *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # As a part of a larger model; the caller's dictionary is its own copy.
        self._fxp_checkpoints.translate(state_dict, prefix)
        self._fxp_live._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            live = self.__dict__.get("_fxp_live")
            if live is None:
                raise
            return getattr(live, name)

    # By the names of the user's model, whatever attributes of ours have the same.
    def get_submodule(self, target: str) -> nn.Module:
        """The submodule of the user's model with this dotted name."""
        return self._fxp_live.get_submodule(target)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter with this dotted name."""
        return self._fxp_live.get_parameter(target)

    def get_buffer(self, target: str) -> Tensor:
        """The buffer with this dotted name."""
        return self._fxp_live.get_buffer(target)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and "_fxp_live" in self.__dict__:
            self.__dict__["training"] = self._fxp_live.training = value
        elif name.startswith(("_fxp_", "__")) or name in self.__dict__ or "_fxp_live" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._fxp_live, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._fxp_live, name)

    # Python looks up operators on the class: containers (nn.Sequential, nn.ModuleList) are reached through these.
    def __getitem__(self, key: Any) -> Any:
        return self._fxp_live[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._fxp_live[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._fxp_live[key]

    def __len__(self) -> int:
        return len(self._fxp_live)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._fxp_live)

    def __contains__(self, value: object) -> bool:
        return value in self._fxp_live

    def __bool__(self) -> bool:
        return bool(self._fxp_live)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._fxp_live)})

    def __repr__(self) -> str:
        return f"ParametrizedModule({self._fxp_live!r})"

    # --- looking inside

    @property
    def graph(self) -> fx.Graph:
        """The whole rewritten graph, weights computed in it.

        Raises:
            TraceError: the body is live Python; the message says why and what to type.
        """
        graph = copy.deepcopy(self._fxp_runtime.regions.whole_graph())
        for node in list(graph.nodes):
            if getattr(node.target, "__name__", "") == "deliver":
                graph.erase_node(node)
        return graph

    @property
    def prologue(self) -> fx.GraphModule:
        """What runs once per optimizer step: latents and buffers in (``prologue_inputs`` by name), weights out."""
        return self._fxp_runtime.plan.prologue

    @property
    def body(self) -> nn.Module:
        """What runs per call: a ``GraphModule`` where there is a graph of the whole, else the live modules.

        The graph of a recorded model takes the tensors among its arguments, and returns those among its results.
        """
        plan = self._fxp_runtime.plan
        if plan.body is None and "" in plan.recorded:
            return plan.recorded[""][-1].module
        return self._fxp_live if plan.body is None else plan.body

    @property
    def report(self) -> Report:
        """What was done, what was refused and why; printable."""
        runtime = self._fxp_runtime
        return make_report(
            self._fxp_live,
            self.sites,
            runtime.plan,
            runtime.regions.layers,
            runtime.stats,
            runtime.reached,
            self._fxp_options.get("notes", ()),
        )

    @property
    def stats(self) -> Stats:
        """How often the weights were computed and how often they were at hand."""
        return self._fxp_runtime.stats

    # --- copies

    def _replicate_for_data_parallel(self) -> ParametrizedModule:
        """A copy for one forward; its children and tensors are put into it afterwards, through its attributes."""
        live = self._fxp_live._replicate_for_data_parallel()
        replica = type(self).__new__(type(self))
        runtime = ReplicaRuntime(live, self.sites, self.stats)
        replica.__dict__.update(self.__dict__)
        replica.__dict__.update(_fxp_live=live, _fxp_runtime=runtime, _fxp_inline=runtime.inline, _fxp_compiled=None)
        replica.__dict__.update({registry: live.__dict__[registry] for registry in _SHARED})
        return replica

    def __copy__(self) -> ParametrizedModule:
        # A shallow copy shares the live tree, and so it must share the runtime that the tree is bound to.
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Plans and caches are derived; the shared registries come back from the live tree.
        derived = ("_fxp_runtime", "_fxp_checkpoints", "_fxp_inline", "_fxp_compiled", *_SHARED)
        return {key: value for key, value in self.__dict__.items() if key not in derived} | {"_fxp_sites": self.sites}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(state)
        self._attach()
