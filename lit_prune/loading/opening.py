"""How a module gets its model, and what must hold of it then."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.calibration.statistics import require_finite
from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.export import read_lineage
from lit_prune.export.trial import stock_class
from lit_prune.loading.pretrained import load_pretrained, resolve
from lit_prune.structure import Layout, Structure, Widths, settle


def load_dense(module: Any) -> tuple[Any, Any]:
    """The model and its tokenizer as they are where a `PrunableLM` has them from."""
    return load_pretrained(
        module.pretrained,
        dtype=DTYPES[module.dtype_name],
        attn_implementation=module.attn_implementation,
        **module.access,
    )


def configure(module: Any) -> None:
    """Load a `PrunableLM`'s model, with what an earlier pruning wrote down of it."""
    model, tokenizer = load_dense(module)
    module._outside.setdefault("tokenizer", tokenizer)
    take(module, model)


def take(module: Any, model: Any) -> None:
    """Make a model a `PrunableLM`'s, with what an earlier pruning wrote down of it.

    Args:
        module: The `PrunableLM`.
        model: Read from `module.pretrained`, with weights or on meta.
    """
    widths = None
    source = resolve(module.pretrained)
    if source.local and source.gguf is None:
        record = read_lineage(source.place)
        module.lineage = list(record["lineage"])
        if record["layout"] is not None:
            saved = record["layout"]["widths"]
            widths = Widths(saved["shared"], saved["layers"])
    adopt(module, model, widths)
    module.model = model  # a submodule from here on
    module.is_stock = widths is None or settle(model, module.structure, module.layout)


def adopt(module: Any, model: Any, widths: Widths | None = None) -> None:
    """Make a model the one that a `Prunable` offers to callbacks.

    Args:
        module: The `Prunable`.
        model: A causal language model of transformers.
        widths: Its widths, where its config does not tell them.

    Raises:
        UserError: There is one already, the family is unknown, or `model` is something else.
    """
    if "model" in module._outside:
        raise UserError(
            f"expected one language model in a {type(module).__name__}, got a second; make a new "
            "module for it, and let configure_model do nothing when self.model is there"
        )
    structure = Structure.of(model, widths)
    _check_name(module, model)
    if "model" not in module._modules:
        vars(module)["model"] = model  # no submodule: its weights are saved where they stand
    streamed = any(parameter.is_meta for parameter in model.parameters())
    digest = None if streamed else digest_of(model)  # that of a part would be another's
    module._outside.update(model=model, structure=structure, digest=digest)
    module.layout = Layout.full(structure.widths)
    module.vocab_size = model.config.vocab_size


def structure_of(module: Any) -> Structure:
    """The structure of a `Prunable`'s model.

    Raises:
        UserError: It has none, or another under that name.
    """
    if "structure" not in module._outside:
        raise UserError(
            f"expected {type(module).__name__} to have a language model, got none; call "
            "self.adopt(model) in its __init__ or configure_model"
        )
    _check_name(module, module._outside["model"])
    return module._outside["structure"]


def name_of(model: Any) -> str:
    """Where a model of transformers comes from, or its class if it does not know."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def check_adopted(module: Any, protocol: type) -> None:
    """Hold that a `Prunable` has a model, and that nothing of its own stands in the way.

    Args:
        module: The module.
        protocol: `Prunable`.

    Raises:
        UserError: Something is missing or has a name that is taken.
    """
    structure_of(module)
    name, model = type(module).__name__, module._outside["model"]
    if all(part is not model for part in module.modules()):
        raise UserError(
            f"expected the adopted model to be part of {name}, got one that is not; assign it, or "
            "the module that holds it, to an attribute"
        )
    hidden = [key for key in (*module._modules, *vars(module)) if key in vars(protocol)]
    if hidden:
        raise UserError(
            f"expected {name}.{hidden[0]} to be that of {protocol.__name__}, got a "
            f"{type((module._modules | vars(module))[hidden[0]]).__name__}; rename yours"
        )


def _check_name(module: Any, model: Any) -> None:
    held = module.model
    if held is not None and held is not model:
        raise UserError(
            f"expected {type(module).__name__}.model to be the adopted language model, got a "
            f"{type(held).__name__}; rename yours"
        )


def check_optimizers(module: Any, optimizers: Sequence[Any]) -> None:
    """Hold that optimizers made after a cut train parameters that are left, not those before it.

    Args:
        module: The module.
        optimizers: What its `configure_optimizers` gave.

    Raises:
        UserError: One has another parameter.
    """
    live = {id(parameter) for parameter in module.parameters()}
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    if any(id(parameter) not in live for group in groups for parameter in group):
        raise UserError(
            f"expected configure_optimizers of {type(module).__name__} to collect the parameters "
            "each time it is called, got some that the module no longer has after a cut"
        )


def check_loss(module: Any, asked: Any) -> None:
    """Hold that a `Prunable` trains on the loss that a callback has put in place, if one has.

    Args:
        module: The module.
        asked: The `loss_term` that its method `loss` last made use of.

    Raises:
        UserError: It is another.
    """
    term = module.loss_term
    if term is not None and asked is not term:
        raise UserError(
            f"expected training_step of {type(module).__name__} to return self.loss(batch, output, "
            f"own_loss), since {type(getattr(term, '__self__', term)).__name__} replaces the loss, "
            "got one that never asks for it; return that, or leave out the callback"
        )


def check_output(output: Any) -> None:
    """Hold that what a loss is taken of is a language model's output.

    Raises:
        UserError: It has no logits.
    """
    if not hasattr(output, "logits"):
        raise UserError(
            "expected an output with logits for self.loss(batch, output), as transformers' models "
            f"return it, got {type(output).__name__}; hand that on"
        )


def check_class(module: Any) -> None:
    """Hold that a `Prunable`'s model can be exported: its class is one of transformers.

    Raises:
        UserError: It has code of its own, of which an export could carry nothing.
    """
    structure_of(module)
    kind = stock_class(type(module._outside["model"]))
    if getattr(transformers, kind.__name__, None) is not kind:
        raise UserError(
            f"expected a model class of transformers for the export, got {kind.__name__} with code "
            "of its own; load the model without that, or leave out the export"
        )


def check_finite(module: Any, loss: Any) -> None:
    """Stop a training whose loss is NaN or infinite, on all processes alike.

    Args:
        module: A `Prunable`, before the backward pass.
        loss: [].

    Raises:
        UserError: It is.
    """
    bad = ~loss.detach().isfinite()
    trainer = module._trainer  # none where a hook is called by hand
    own = bool(bad)
    if trainer is not None and trainer.world_size > 1:  # others would wait for this one's gradients
        bad = trainer.strategy.reduce(bad.float().clone(), reduce_op="sum")
    if not bool(bad):
        return
    phase = "mask learning" if module.gates is not None else "recovery"
    if phase == "recovery" and module.pruning_ahead:
        phase = "training before the cut"
    # optimizers of callbacks and of other modules go on with the rates that they were saved with
    advice = "start anew with a lower learning rate or --model.dtype float32"
    if hasattr(module, "optimization") and module.gates is None:
        advice = (
            "go on from the last checkpoint, which is from before it, with a lower "
            "--model.learning_rate, or start anew with --model.dtype float32"
        )
    found = f"{float(loss.detach())}" if own else "NaN or infinity in another process"
    raise UserError(
        f"expected a finite loss in training, got {found} in step {module.global_step + 1} "
        f"({phase}); {advice}"
    )


def check_weights(module: Any) -> None:
    """Hold that a `Prunable`'s weights are numbers, which its last step may have spoiled.

    Raises:
        UserError: One is NaN or infinite.
    """
    for name, parameter in module.model.named_parameters():
        require_finite(parameter.detach(), "weights", f"in {name} at the end")


def check_trained(module: Any) -> None:
    """Hold that what a `Prunable` trains is numbers, before it replaces an earlier checkpoint.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = parameter.detach()
            own = own.to_local() if hasattr(own, "to_local") else own  # pyright: ignore
            require_finite(own, "weights", f"in {name} after step {module.global_step}")


def digest_of(model: Any) -> str:
    """Tells models of one shape apart: a digest of some values of each weight, in bfloat16."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.is_meta:
            some = parameter.detach().flatten()[:16].to("cpu", torch.bfloat16)
            found.update(bytes(some.view(torch.uint8).tolist()))
    return found.hexdigest()[:16]


def check_length(module: Any, tokens: int, what: str) -> None:
    """Refuse windows longer than a model has positions for, and warn where it has no table.

    Args:
        module: A `Prunable`.
        tokens: Their length.
        what: What they are, for the message.

    Raises:
        UserError: The model looks positions up in a table that is shorter.
    """
    limit = getattr(module.model.config, "max_position_embeddings", None) or tokens
    if tokens <= limit:
        return
    message = f"expected {what} of at most {limit} tokens, the model's context, got {tokens}"
    if "position" in module.structure.widths.shared:
        raise UserError(f"{message}; set a shorter length")
    rank_zero_warn(f"{message}: the figures will say little")
