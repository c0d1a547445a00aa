"""FSDP2: the model's parameters and their optimizer states divided over the processes of a fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lit_prune.errors import UserError

#: Where the hooks come from that `fully_shard` leaves on modules, and its other attributes' names.
_FSDP = "torch.distributed.fsdp"
_MARKS = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy for a model that changes its shape.

    While a `lit_prune.Prunable` trains, every process holds a share of each parameter, of its
    gradient and of its optimizer state; a decoder layer is gathered when it computes. Whatever
    looks at the whole model, or changes it, finds an ordinary one, as under ddp: before training,
    within `whole`, and after training. So each process holds the whole model, and the states of
    its optimizers, for a time: when it is loaded, at each cut and at the end.

    A checkpoint is one file with whole tensors; fits on one device or under ddp go on from it, and
    the other way round. A teacher is whole on each process, and so are quantized weights under
    adapters and parameters outside of the language model. The module must call its language model
    as such, no parts of it.

    Args:
        process_group_backend: How processes talk, such as ``gloo``; None for what the device has.
        timeout: How long they wait for each other.
    """

    # As for ddp, since the model is whole then.
    setup = ParallelStrategy.setup
    load_checkpoint = ParallelStrategy.load_checkpoint
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        # the parameters that stand aside while shares of them train, empty; holders of them go on
        self._aside: dict[str, nn.Parameter] = {}
        self._hooks: list[Any] = []

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights find the model before it is divided."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """And so do the optimizers' states."""
        return True

    def setup_environment(self) -> None:
        """Start the processes; all of them share the data and the parameters."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizers, on whole parameters.

        Raises:
            UserError: One can't work on shares of parameters.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.startswith("bitsandbytes"):
                raise UserError(
                    f"expected an optimizer for shares of parameters under fsdp2, got "
                    f"bitsandbytes' {type(optimizer).__name__}; use adamw"
                )

    def on_train_start(self) -> None:
        """Divide the model; the last thing before the first step."""
        super().on_train_start()
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = partial(_clip_by_norm, plugin.main_params)
        plugin.clip_grad_by_value = partial(_clip_by_value, plugin.main_params)
        self._shard()

    def on_train_end(self) -> None:
        """Put the model together, for what measures and exports it."""
        self._gather()
        super().on_train_end()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let every process have the whole model for a while, as an ordinary one.

        Optimizers go on with their states. Within, the model may be changed and optimizers made
        anew; not between a backward pass and the optimizer's step, as gradients are dropped.
        """
        if not self._aside:
            yield
            return
        self._gather()
        yield
        self._shard()

    # --- checkpoints ---------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's whole state; on other processes than the first it is empty."""
        module = self._module()
        if not self._aside:
            return module.state_dict()
        _reshard(module)
        held = module.state_dict(keep_vars=True)
        whole: dict[int, Any] = {}
        for value in {id(value): value for value in held.values()}.values():  # tied ones once
            tensor = _full(value)  # all processes take part
            if self.is_global_zero:
                whole[id(value)] = tensor.detach().cpu() if isinstance(tensor, Tensor) else tensor
        return {name: whole[id(value)] for name, value in held.items()} if whole else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's whole state."""
        found: dict[str, Any] = super(ModelParallelStrategy, self).optimizer_state(optimizer)
        states = found["state"].items()  # the optimizer's own
        whole = {key: {k: _full(value) for k, value in state.items()} for key, state in states}
        return {**found, "state": whole}

    # --- dividing ------------------------------------------------------------------------------

    def _module(self) -> Any:
        module: Any = self.lightning_module
        if module is None:
            raise RuntimeError("expected a fit")
        return module

    def _shard(self) -> None:
        """Divide the language model's parameters, and what optimizers hold for them."""
        module = self._module()
        model, path = module.model, module.structure.layers_path
        _check(model, path)
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.contiguous()
            dist.broadcast(tensor.data, 0)  # as ddp does: the shares are of one model
        before = dict(module.named_parameters(remove_duplicate=False))
        mesh = self.device_mesh["data_parallel"]
        for part in [*model.get_submodule(path), model]:
            fully_shard(part, mesh=mesh)
        after = dict(module.named_parameters(remove_duplicate=False))
        _replace(self.optimizers, {before[name]: after[name] for name in before}, _like)
        self._aside = {name: p for name, p in before.items() if isinstance(after[name], DTensor)}
        for parameter in self._aside.values():
            parameter.data, parameter.grad = parameter.new_empty(0), None
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                hook = parameter.register_post_accumulate_grad_hook(_average)
                self._hooks.append(hook)

    def _gather(self) -> None:
        """Put the parameters together, and leave nothing of FSDP2 on the modules."""
        if not self._aside:
            return
        module = self._module()
        _reshard(module)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        shares = dict(module.named_parameters(remove_duplicate=False))
        for name, parameter in self._aside.items():
            if not parameter.numel():  # tied ones come twice
                parameter.data = _full(shares[name])
                parameter.requires_grad = shares[name].requires_grad
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = parameter
        for part in module.modules():
            _strip(part)
        back = {shares[name]: parameter for name, parameter in self._aside.items()}
        _replace(self.optimizers, back, lambda value, parameter: _full(value))
        self._aside = {}


StrategyRegistry.register("fsdp2", ShardedStrategy, "FSDP2 for models that change their shape")


def _check(model: nn.Module, path: str) -> None:
    """Refuse a model whose layers can't be divided one by one; `path` is where they are.

    Raises:
        UserError: It is such a one.
    """
    homes: dict[nn.Parameter, str] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = name.removeprefix(f"{path}.").split(".")[0] if name.startswith(f"{path}.") else ""
        if homes.setdefault(parameter, home) != home:
            raise UserError(f"expected layers with weights of their own under fsdp2, got {name}")
        if parameter.requires_grad and dtypes.setdefault(home, parameter.dtype) != parameter.dtype:
            raise UserError(
                f"expected trained weights of one dtype under fsdp2, got {name} in another; train "
                "adapters, or set --model.dtype"
            )


def _full(value: Any) -> Any:
    """The whole of a tensor that is divided; other things as they are."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """An entry of an optimizer's state, divided as its parameter is."""
    alike = isinstance(value, Tensor) and value.shape == parameter.shape
    if not alike or not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _replace(
    optimizers: list[Optimizer],
    new: Mapping[Any, nn.Parameter],
    convert: Callable[[Any, nn.Parameter], Any],
) -> None:
    """Let optimizers go on with other parameters in the places of theirs."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
        states: Any = defaultdict(dict)
        for parameter, state in optimizer.state.items():
            other: Any = new.get(parameter, parameter)
            states[other] = {name: convert(value, other) for name, value in state.items()}
        optimizer.state = states


def _average(parameter: nn.Parameter) -> None:
    """Take the mean of a gradient over the processes; right for accumulated ones, too."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _clip_by_norm(parameters: Callable[[Any], Any], optimizer: Any, clip_val: float) -> None:
    """Clip by the norm of all gradients; torch's own takes no divided and whole ones together.

    Args:
        parameters: The plugin's `main_params`.
        optimizer: Whose gradients.
        clip_val: Their norm at most.
    """
    held = [p for p in parameters(optimizer) if p.grad is not None]
    kinds = [[p for p in held if isinstance(p, DTensor) is divided] for divided in (True, False)]
    kinds = [kind for kind in kinds if kind]
    if kinds:
        norms = [_full(get_total_norm([p.grad for p in kind])) for kind in kinds]
        total = torch.stack([norm.float() for norm in norms]).norm()
        for kind in kinds:
            clip_grads_with_norm_(kind, clip_val, total)


def _clip_by_value(parameters: Callable[[Any], Any], optimizer: Any, clip_val: float) -> None:
    """Clip each number of the gradients, divided and whole ones; arguments as above."""
    for parameter in parameters(optimizer):
        grad = parameter.grad
        if grad is not None:
            (grad.to_local() if isinstance(grad, DTensor) else grad).clamp_(-clip_val, clip_val)


def _reshard(module: nn.Module) -> None:
    """Let go of what was gathered for computing, as a validation leaves it."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _strip(module: nn.Module) -> None:
    """Take off what `fully_shard` left on a module, for which torch has no function."""
    tables = [v for name, v in vars(module).items() if "_hooks" in name and isinstance(v, dict)]
    own = {
        key
        for table in tables
        for key, hook in table.items()
        if str(getattr(hook, "__module__", "")).startswith(_FSDP)
    }
    for table in tables:
        for key in own & table.keys():
            del table[key]
    if isinstance(module, FSDPModule):
        line = type(module).__mro__
        module.__class__ = line[line.index(FSDPModule) + 1]
        _composable_state._module_state_mapping.pop(module, None)
    for name in [name for name in vars(module) if name.startswith(_MARKS)]:
        delattr(module, name)
