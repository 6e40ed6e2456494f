"""What a script does to a model besides running it: it writes to its tensors, and changes its modes and structure."""

# mypy: disable-error-code="operator,union-attr,arg-type,attr-defined,misc", warn-unused-ignores=False

from __future__ import annotations

import copy
import gc
import pickle
import zlib
from collections.abc import Callable, Sequence

import torch
from runtime.machine.training import Training
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda held: torch.optim.SGD(held, 0.01, foreach=False),
    "sgd-foreach": lambda held: torch.optim.SGD(held, 0.01, foreach=True, momentum=0.9),
    "sgd-fused": lambda held: torch.optim.SGD(held, 0.01, fused=True),
    "adam": lambda held: torch.optim.Adam(held, 0.01, eps=1e-3),
    "adam-fused": lambda held: torch.optim.Adam(held, 0.01, eps=1e-3, fused=True),
}


class Writing(Training):
    """Writes to parameters, buffers and weights."""

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        if name not in self.optimizers:
            self.optimizers[name] = OPTIMIZERS[name](self.parameters())
        return self.optimizers[name]

    def step(self, name: str) -> None:
        self.optimizer(name).step()

    def lbfgs(self, seed: int) -> None:
        optimizer = torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(seed)
            loss.backward()
            return loss

        optimizer.step(closure)

    def step_by_hand(self, how: str) -> None:
        held = [parameter for parameter in self.parameters() if parameter.grad is not None]
        with torch.inference_mode() if how == "inference" else torch.no_grad():
            if how == "foreach" and held:
                torch._foreach_add_(held, [parameter.grad for parameter in held], alpha=-0.01)
            elif how == "data":
                for parameter in held:
                    parameter.data = parameter.data - 0.01 * parameter.grad
            else:
                for parameter in held:
                    parameter -= 0.01 * parameter.grad

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none)

    def load(self, seed: int, assign: bool, buffers: bool) -> None:
        state = self.model.state_dict()
        fixed = set() if buffers else {name for name, _ in self.model.named_buffers()}
        for name in state.keys() - fixed:
            # By its name: the oracle's state has more in it.
            number = seed + zlib.crc32(name.replace("/", ".").encode())
            state[name] = state[name] + 0.1 * self.noise(number, *state[name].shape)
        self.model.load_state_dict(state, assign=assign)
        if assign:
            self.optimizers, self.handles = {}, []

    def write(self, at: int, seed: int, how: str) -> None:
        """One parameter gets a new value."""
        _, parameter = self.parameter(at)
        value = parameter.detach() + 0.1 * self.noise(seed, *parameter.shape)
        if how == "data":
            parameter.data = value
        elif how == "set":
            with torch.no_grad():
                parameter.set_(value)  # type: ignore[call-overload]
        elif how == "vector":
            vector = torch.cat([p.detach().flatten() for p in self.parameters()])
            torch.nn.utils.vector_to_parameters(vector + 0.01, self.parameters())
        else:
            with torch.inference_mode() if how == "inference" else torch.no_grad():
                parameter.copy_(value)

    def exchange(self, first: int, second: int) -> None:
        """Two parameters of one shape exchange their memory: no sum over addresses or versions tells."""
        (_, a), (_, b) = self.parameter(first), self.parameter(second)
        if a.shape == b.shape:
            a.data, b.data = b.data, a.data

    def write_buffer(self, at: int, seed: int) -> None:
        named = sorted((name.replace("/", "."), buffer) for name, buffer in self.model.named_buffers() if buffer.numel())
        if named:
            buffer = named[at % len(named)][1]
            with torch.no_grad():
                buffer.copy_(buffer + 0.1 * self.noise(seed, *buffer.shape))

    def write_weight(self, name: str) -> None:
        """Into the computed tensor itself, which is nobody's."""
        with torch.no_grad():
            self.read(self.model, name).mul_(2)

    def exponential_average(self, seed: int, mode_first: bool) -> list[Tensor]:
        """Other values for an evaluation, by writes that nothing can see."""
        parameters = self.parameters()
        kept = [parameter.detach().clone() for parameter in parameters]

        def put(values: Sequence[Tensor]) -> None:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)

        self.model.train(not mode_first)
        put([value + 0.1 * self.noise(seed + number, *value.shape) for number, value in enumerate(kept)])
        self.model.eval()
        outputs = self.forward("no_grad", seed)
        self.model.train(mode_first)
        put(kept)
        self.model.train()
        return outputs


class World(Writing):
    """Everything above, and modes and structure."""

    def switch_autocast(self, on: bool) -> None:
        """From the next action on."""
        self.autocast = on

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def train_part(self, name: str, mode: bool) -> None:
        self.model.get_submodule(name).train(mode)

    def require(self, at: int, flag: bool) -> None:
        self.parameter(at)[1].requires_grad_(flag)

    def require_all(self, prefix: str, flag: bool) -> None:
        for name, parameter in self.named():
            if name.startswith(prefix):
                parameter.requires_grad_(flag)

    def hook(self, at: int, how: str) -> None:
        name, parameter = self.parameter(at)
        if not parameter.requires_grad:
            return
        if how == "double":
            self.handles.append(parameter.register_hook(lambda gradient: 2 * gradient))
        elif how == "seen":
            self.handles.append(parameter.register_hook(lambda gradient: self.fired.update([f"{name} {gradient is None}"])))
        else:
            self.handles.append(parameter.register_post_accumulate_grad_hook(lambda _: self.fired.update([name])))

    def unhook(self, all_of_them: bool) -> None:
        for handle in self.handles if all_of_them else self.handles[:1]:
            handle.remove()
        self.handles = [] if all_of_them else self.handles[1:]

    def convert(self, swapping: bool) -> None:
        """To the other precision and back, in place or by swapping the parameters: a transformed model, which holds no graph
        then. Plain modules may well refuse because something of an earlier backward is not collected yet.
        """
        swapping = swapping and hasattr(self.model, "defer_backward")
        gc.collect()
        other = torch.float32 if self.dtype == torch.float64 else torch.float64
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(swapping)
        try:
            self.model.to(other).to(self.dtype)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    def duplicate(self, how: str) -> None:
        """Go on with a copy; the original stays at hand."""
        twin = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        self.spare = (self.model, self.optimizers)
        self.model, self.optimizers = twin, {}

    def swap(self) -> None:
        """Go on with the other copy."""
        if self.spare is not None:
            (self.model, self.optimizers), self.spare = self.spare, (self.model, self.optimizers)
