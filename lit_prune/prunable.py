"""What a LightningModule must offer so that callbacks can cut its language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_prune.dtypes import keeping_dtypes
from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint
from lit_prune.fitting import state
from lit_prune.fitting.refit import recut
from lit_prune.loading import opening
from lit_prune.recovery import adapters, lora, teacher
from lit_prune.recovery.distillation import LossTerm, cross_entropy
from lit_prune.recovery.quantized import Precision
from lit_prune.structure import Layout, Structure

Phase = Literal["dense", "pruned", "recovery", "done"]


class Prunable(LightningModule):
    """Makes a LightningModule one whose language model callbacks can cut, train and export.

    Name it first among the bases, and hand over the model once, in `__init__` or in
    `configure_model`. The model may stand anywhere in the module::

        class MyModule(Prunable, LightningModule):
            def __init__(self):
                super().__init__()
                self.net = Scaled(AutoModelForCausalLM.from_pretrained("gpt2"))  # has it as .lm
                self.adopt(self.net.lm, AutoTokenizer.from_pretrained("gpt2"))

            def training_step(self, batch, batch_idx):
                output = self.net(batch)
                loss = self.loss(batch, output, cross_entropy(output.logits, batch["labels"]))
                self.log("train/loss", loss)
                return loss

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

    What is asked of the module:

    - `training_step` returns `self.loss(batch, output, own)`, since some callbacks (Distillation,
      VIBPruning) replace the loss. They read `batch["input_ids"]`, `["attention_mask"]` and
      `["labels"]`, [batch, tokens], of which -100 is left out, and `output.logits`, [batch,
      tokens, vocabulary].
    - `configure_optimizers` collects parameters anew, for it is called again after each cut; a
      schedule has `trainer.max_steps - self.first_step` steps before it then.
    - Hooks of this class that it overrides call `super()`: `on_fit_start`, `on_before_backward`,
      `on_save_checkpoint`, `on_load_checkpoint`. So does `__init__`.
    - `configure_model`, if it has one, does nothing when `self.model` is there.
    - Names of this class keep their meaning: `model` is the language model or nothing.
    - Pruning needs a data module with `calibration_batches(samples, length, batch_size)`.

    Other parameters of the module are left alone: they train as they did, and are in no export.
    Modules of its own that read or write hidden states forbid the axis ``hidden``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # before the other bases, one of which may call `adopt`
        #: The language model, once there is one.
        self.model: Any = None
        self.layout: Layout
        #: The model's name in cards and messages.
        self.pretrained = ""
        #: Entries of the model's embedding.
        self.vocab_size: int | None = None
        #: ``dense``, ``pruned``, ``recovery`` (LoRA attached) or ``done`` (merged).
        self.phase: Phase = "dense"
        #: Whether the phase comes from a checkpoint.
        self.resumed = False
        #: Whether methods may choose only what the family's stock config can express.
        self.stock = False
        #: Whether the model's stock class can express what is left.
        self.is_stock = True
        self.adapter: dict[str, Any] | None = None
        #: What was done, step by step, as plain types; `lineage` is of models it started from.
        self.history: list[dict[str, Any]] = []
        self.lineage: list[Any] = []
        #: Time that steps took.
        self.seconds: dict[str, float] = {}
        #: Optimizer steps before the last `recut`, which starts the schedule anew.
        self.first_step = 0
        #: What callbacks found out for the report, by section, as plain types.
        self.findings: dict[str, Any] = {}
        #: Filled by a report callback, for the model card.
        self.report: dict[str, Any] | None = None
        #: Set by a callback that replaces the loss.
        self.loss_term: LossTerm | None = None
        #: What a callback trains beside the model, such as mask probabilities.
        self.gates: nn.Module | None = None
        #: Whether a callback will cut again, so that recovery waits.
        self.pruning_ahead = False
        #: Whether the dense model is kept when it is first cut, and how.
        self.keep_teacher = False
        self.teacher_precision: Precision = "dense"
        # not in the module tree: not saved, not in DDP's buckets
        self._outside: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    # --- the model -----------------------------------------------------------------------------

    def adopt(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Say which language model callbacks shall cut; it is cut in place.

        Args:
            model: A causal language model of transformers, held by the module or a part of it.
            tokenizer: Its tokenizer, for exports and data modules that ask for one.

        Raises:
            UserError: The family is unknown, there is another model already, or `self.model` is
                something else.
        """
        if tokenizer is not None:
            self.tokenizer = tokenizer
        if self._outside.get("model") is not model:
            opening.adopt(self, model)
            self.pretrained = self.pretrained or opening.name_of(model)
            self.is_stock = not hasattr(model.config, "lit_prune")
            self._outside["given"] = True

    @property
    def structure(self) -> Structure:
        """Where each axis of the model lies."""
        return opening.structure_of(self)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        if "tokenizer" not in self._outside:
            self._outside["tokenizer"] = self._load_tokenizer()
        return self._outside["tokenizer"]

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._outside["tokenizer"] = tokenizer

    def _load_tokenizer(self) -> Any:
        return None

    def check_length(self, tokens: int, what: str) -> None:
        """Refuse windows that are too long; see `lit_prune.loading.opening.check_length`."""
        opening.check_length(self, tokens, what)

    # --- training ------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Tensor], output: Any, own: Tensor | None = None) -> Tensor:
        """The loss to train on, [].

        Args:
            batch: `input_ids`, `attention_mask` and `labels`, [batch, tokens].
            output: Has the `logits`, [batch, tokens, vocabulary].
            own: The module's loss; by default next-token cross-entropy. It counts unless a
                callback has set `loss_term`.
        """
        if self.loss_term is not None or own is None:
            opening.check_output(output)
        self._outside["asked"] = self.loss_term
        if self.loss_term is not None:
            return self.loss_term(self, batch, output)
        return cross_entropy(output.logits, batch["labels"]) if own is None else own

    @property
    def optimization_of(self) -> Callable[[Any], Any] | None:
        """Gives the optimizers instead of `configure_optimizers`, as while masks train."""
        return self._outside.get("optimization_of")

    @optimization_of.setter
    def optimization_of(self, own: Callable[[Any], Any] | None) -> None:
        self._outside["optimization_of"] = own
        # covers the method of the module's class, which Lightning would call
        vars(self).pop("configure_optimizers", None)
        if own is not None:
            vars(self)["configure_optimizers"] = partial(own, self)

    def recut(self, trainer: Trainer, change: Callable[[], Layout | None]) -> None:
        """Change the model's shape in the middle of a fit, and everything that depends on it.

        Callbacks with a method `on_before_cut` or `on_after_cut` (trainer, module) are told.

        Args:
            trainer: The trainer that fits this module.
            change: Cuts the model in place and returns what stays, in the numbering of the model
                before it; or changes something else, such as adapters, and returns None.

        Raises:
            UserError: The module does not offer what its class asks, or the trainer can't do it.
        """
        opening.check_adopted(self, Prunable)
        recut(self, trainer, change)
        opening.check_optimizers(self, trainer.optimizers)

    # --- recovery and the end ------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module | None:
        """The dense model, if `keep_teacher` was set before the first cut."""
        return self._outside.get("teacher")

    def require_teacher(self, precision: Precision = "dense") -> nn.Module:
        """The dense model on the module's device; see `lit_prune.recovery.teacher.require`."""
        opening.check_adopted(self, Prunable)
        return teacher.require(self, precision)

    def check_adapter(self, **options: Any) -> None:
        """Refuse what `attach_adapter` would refuse, before much time is spent."""
        adapters.check(self, options)

    def attach_adapter(self, **options: Any) -> None:
        """Attach LoRA and freeze the rest; see `lit_prune.recovery.adapters.attach`."""
        self.adapter = adapters.attach(self, options)
        self.phase = "recovery"

    def finish(self) -> None:
        """Merge the adapter, if there is one; the model is then a plain one, in eval mode."""
        opening.check_adopted(self, Prunable)
        lora.merge_lora(self.model)
        self.model.eval()
        self.phase = "done"

    def export(self, out: Any, card: str) -> bool:
        """Write the model as a Hugging Face checkpoint.

        Args:
            out: The folder to make.
            card: Text of its README.md.

        Returns:
            Whether it is stock; if not, it carries a modelling file of its own.

        Raises:
            UserError: The model was left half cut, or a weight is not finite.
        """
        opening.check_weights(self)
        return export_checkpoint(
            self.model,
            self.tokenizer,
            out,
            config=self.model.config,
            layout=self.layout.to_dict(),
            lineage=[*self.lineage, *self.history],
            card=card,
        )

    # --- Lightning -----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the model into training mode, which loading left it out of."""
        super().on_fit_start()
        if self.model is not None:
            self.model.train()

    def on_before_backward(self, loss: Tensor) -> None:
        """Refuse to train on a loss that a callback has replaced, or that is not finite.

        Raises:
            UserError: `training_step` never asked for the callback's, or it is NaN or infinite.
        """
        super().on_before_backward(loss)
        opening.check_finite(self, loss)
        opening.check_loss(self, self._outside.get("asked"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is needed to build the model again before its weights are loaded.

        Raises:
            UserError: The last step has spoiled the weights; earlier checkpoints stay.
        """
        super().on_save_checkpoint(checkpoint)
        opening.check_trained(self)
        checkpoint["lit_prune"] = state.saved(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the dense model into the shape that the checkpoint's weights have.

        Raises:
            UserError: The checkpoint is of another model.
        """
        super().on_load_checkpoint(checkpoint)
        opening.check_adopted(self, Prunable)
        state.load(self, checkpoint.get("lit_prune"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert, but leave computed buffers and adapters their dtype."""
        with keeping_dtypes(self):
            super()._apply(fn, recurse)
        return self


def require(pl_module: LightningModule, callback: Callback) -> None:
    """Refuse a module that callbacks can't work on; to be called in a callback's `setup`.

    Args:
        pl_module: The trainer's module.
        callback: The callback that works on it.

    Raises:
        UserError: It is not `Prunable`.
    """
    if not isinstance(pl_module, Prunable):
        name = type(pl_module).__name__
        raise UserError(
            f"expected a lit_prune.Prunable module for {type(callback).__name__}, got {name}; make "
            f"it a class {name}(Prunable, LightningModule) that calls self.adopt(model)"
        )
