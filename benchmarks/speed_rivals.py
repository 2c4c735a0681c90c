"""Other ways to put a mixture into a model: a dense merge, PEFT's add_weighted_adapter, LoraHub's sums.

Each is a context within which the model answers as merged, and leaves it as it was; all share one model, so
that they can be timed in turn. Knows stacks and PEFT; not what is scored. PEFT and LoraHub take one weight an
adapter; linear and LoraHub weigh A and B apart, (sum w_i B_i)(sum w_i A_i) for LoraHub, which is not the
mixture itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from search.groups import Groups
from search.stack import StackedFactors

_MERGED, _HUB = "merged", "hub"


@contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have other modules in a model's places within the context."""
    places = {
        name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in modules
    }
    before = {name: getattr(*place) for name, place in places.items()}
    try:
        for name, place in places.items():
            setattr(*place, modules[name])
        yield
    finally:
        for name, place in places.items():
            setattr(*place, before[name])


class DenseMerge:
    """Weights of one merge, in buffers that are allocated once."""

    def __init__(self, model: Any, stacked: StackedFactors, groups: Groups) -> None:
        """Allocate a weight for each touched layer."""
        self._stacked, self._groups = stacked, groups
        self._layers = {name: model.get_submodule(name) for name in stacked.modules}
        self._own = {name: layer.weight for name, layer in self._layers.items()}
        self._buffers = {
            name: nn.Parameter(torch.empty_like(weight), requires_grad=False)
            for name, weight in self._own.items()
        }

    @torch.no_grad()
    def fold(self, coefficients: Tensor) -> None:
        """Write W + B (c * A) into the buffers; coefficients (n_groups, n_adapters) on the device."""
        for name, module in self._stacked.modules.items():
            c = coefficients[self._groups.group_of[name], module.owner]
            scaled = (module.B * c).to(module.B.dtype)
            torch.addmm(self._own[name], scaled, module.A, out=self._buffers[name].data)

    @contextmanager
    def merged(self, coefficients: Tensor) -> Iterator[None]:
        """Run the model on the merge within the context."""
        self.fold(coefficients)
        try:
            for name, layer in self._layers.items():
                layer.weight = self._buffers[name]
            yield
        finally:
            for name, layer in self._layers.items():
                layer.weight = self._own[name]


class PeftWays:
    """The adapters in PEFT, on the same base weights."""

    def __init__(self, model: Any, stacked: StackedFactors) -> None:
        """Inject all adapters, fill them from the stack, and take them out of the model again."""
        self._model, self._names = model, list(stacked.names)
        bare = {name: model.get_submodule(name) for name in stacked.modules}
        rank = next(iter(stacked.modules.values())).A.shape[0] // stacked.n_adapters
        targets = sorted({name.rpartition(".")[2] for name in stacked.modules})
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=targets)
        peft = get_peft_model(model, config, adapter_name=self._names[0], autocast_adapter_dtype=False)
        for name in [*self._names[1:], _HUB]:
            peft.add_adapter(name, config, autocast_adapter_dtype=False)
        self._peft: PeftModel = peft.eval()
        self._modules = {name: model.get_submodule(name) for name in stacked.modules}
        self._fill(stacked)
        self._peft.requires_grad_(False)
        self._states = [get_peft_model_state_dict(peft, adapter_name=name) for name in self._names]
        for name, layer in bare.items():
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)

    def _fill(self, stacked: StackedFactors) -> None:
        for name, layer in self._modules.items():
            module: Any = layer
            stack = stacked.modules[name]
            for index, adapter in enumerate(self._names):
                own = stack.owner == index
                module.lora_A[adapter].weight.data = stack.A[own].clone()
                module.lora_B[adapter].weight.data = stack.B[:, own].clone()
            for factors in (module.lora_A, module.lora_B):
                factors[_HUB].to(stack.A.device, stack.A.dtype)

    @contextmanager
    def weighted(self, weights: Sequence[float], how: str) -> Iterator[None]:
        """Add a weighted adapter, "linear" or "cat", run on it within the context, and delete it."""
        with _replaced(self._model, self._modules):
            self._peft.add_weighted_adapter(self._names, list(weights), _MERGED, combination_type=how)
            try:
                self._peft.set_adapter(_MERGED, inference_mode=True)
                yield
            finally:
                self._peft.delete_adapter(_MERGED)

    @contextmanager
    def lorahub(self, weights: Sequence[float]) -> Iterator[None]:
        """Sum the adapters' state dicts as LoraHub does, load the sum, and run on it within the context."""
        with _replaced(self._model, self._modules):
            total = {key: weights[0] * tensor for key, tensor in self._states[0].items()}
            for weight, state in zip(weights[1:], self._states[1:], strict=True):
                for key, tensor in state.items():
                    total[key] = total[key] + weight * tensor
            set_peft_model_state_dict(self._peft, total, adapter_name=_HUB)
            self._peft.set_adapter(_HUB, inference_mode=True)
            yield
