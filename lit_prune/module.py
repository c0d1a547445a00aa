"""The LightningModule around a language model that is made smaller while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_prune import adapters, opening, recovery, state, teacher
from lit_prune.distillation import LossTerm, cross_entropy
from lit_prune.dtypes import DTYPES, keeping_dtypes
from lit_prune.errors import UserError
from lit_prune.evaluation import TokenPerplexity
from lit_prune.export import export_checkpoint
from lit_prune.pretrained import load_tokenizer
from lit_prune.quantized import Precision
from lit_prune.refit import recut
from lit_prune.schedule import OptimizerName, Shape, check_settings, optimization
from lit_prune.structure import Layout, Structure

Phase = Literal["dense", "pruned", "recovery", "done"]


class PrunableLM(LightningModule):
    """A causal language model that callbacks can cut in the middle of a fit.

    It owns the Hugging Face model, the structure of what can be cut, the layout of what is left,
    and the phase: ``dense``, ``pruned``, ``recovery`` (LoRA attached) or ``done`` (merged).

    Args:
        pretrained: Hub id, folder, .gguf file, ``embedded:smollm2-135m-instruct`` or an earlier
            export.
        dtype: The weights' dtype; ``auto`` for the checkpoint's.
        attn_implementation: transformers' name of the attention implementation.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        trust_remote_code: Let code from the model's repository run.
        token: Send the stored hub token, as gated models need.
        stock: Let methods choose only what the family's stock config can express.
        learning_rate: Peak learning rate of AdamW over whatever is trained.
        weight_decay: Weight decay of AdamW.
        warmup: Share of the steps in which the rate rises, before it falls.
        optimizer: AdamW with moments in 32 bit, or in 8 bit (through bitsandbytes).
        schedule: How the rate falls to zero: as a ``cosine``, ``linear``, or not (``constant``).
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        token: bool = False,
        stock: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        optimizer: OptimizerName = "adamw",
        schedule: Shape = "cosine",
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
        self.optimization: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        check_settings(optimizer, schedule, warmup=warmup, **self.optimization)
        self.optimizer_name, self.schedule, self.warmup = optimizer, schedule, warmup
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.access = {"trust_remote_code": trust_remote_code, "token": token}
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.stock = stock
        self.model: Any = None
        self.structure: Structure
        self.layout: Layout
        self.phase: Phase = "dense"
        #: Whether the phase comes from a checkpoint.
        self.resumed = False
        self.adapter: dict[str, Any] | None = None
        #: What was done, step by step, as plain types; `lineage` is of models it started from.
        self.history: list[dict[str, Any]] = []
        self.lineage: list[Any] = []
        #: Whether the model's stock class can express what is left.
        self.is_stock = True
        #: Time that steps took.
        self.seconds: dict[str, float] = {}
        #: Optimizer steps before the last `recut`, which starts the schedule anew.
        self.first_step = 0
        #: Filled by a report callback, for the model card.
        self.report: dict[str, Any] | None = None
        self.loss_term: LossTerm | None = None
        #: Gives the optimizers and schedules instead of this module's own, as while masks train.
        self.optimization_of: Callable[[Any], Any] | None = None
        #: What a callback trains beside the model, such as mask probabilities.
        self.gates: nn.Module | None = None
        #: Whether a callback will cut again, so that recovery waits.
        self.pruning_ahead = False
        #: Whether the dense model is kept when it is first cut, and how.
        self.keep_teacher = False
        self.teacher_precision: Precision = "dense"
        self.perplexity = TokenPerplexity()
        # not in the module tree: not saved, not in DDP's buckets
        self._outside: dict[str, Any] = {}

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, **options: Any) -> PrunableLM:
        """Wrap a model that is in memory already; it is cut in place.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            options: As for the class.
        """
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        module = cls(name, **{"dtype": "auto", **options})
        module._outside["tokenizer"] = tokenizer
        module._outside["given"] = True
        opening.adopt(module, model)
        module.is_stock = not hasattr(model.config, "lit_prune")
        return module

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first asked for."""
        if "tokenizer" not in self._outside:
            self._outside["tokenizer"] = load_tokenizer(self.pretrained, **self.access)
        return self._outside["tokenizer"]

    @property
    def vocab_size(self) -> int | None:
        """Entries of the model's embedding, once there is a model."""
        return None if self.model is None else self.model.config.vocab_size

    def check_length(self, tokens: int, what: str) -> None:
        """Refuse windows longer than the model has positions for, and warn where it has no table.

        Args:
            tokens: Their length.
            what: What they are, for the message.

        Raises:
            UserError: The model looks positions up in a table that is shorter.
        """
        opening.check_length(self, tokens, what)

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is not None:
            return
        opening.configure(self)
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "check") and self.trainer.training:
            with torch.device("cpu"):  # Lightning calls this under the device of the model
                data.check("fit")  # before anything is cut, and now with the vocabulary's size

    # --- cutting -------------------------------------------------------------------------------

    def recut(self, trainer: Trainer, change: Callable[[], Layout | None]) -> None:
        """Change the model's shape in the middle of a fit, and everything that depends on it.

        Callbacks with a method `on_before_cut` or `on_after_cut` (trainer, module) are told.

        Args:
            trainer: The trainer that fits this module.
            change: Cuts the model in place and returns what stays, in the numbering of the model
                before it; or changes something else, such as adapters, and returns None.
        """
        recut(self, trainer, change)

    @property
    def teacher(self) -> nn.Module | None:
        """The dense model, if `keep_teacher` was set before the first cut."""
        return self._outside.get("teacher")

    def require_teacher(self, precision: Precision = "dense") -> nn.Module:
        """The dense model on this module's device, loaded again if a resumed run has none.

        Args:
            precision: How the weights of its layers are held.

        Raises:
            UserError: The model was given in memory and is cut, and no such copy was kept.
        """
        return teacher.require(self, precision)

    # --- recovery ------------------------------------------------------------------------------

    def check_adapter(self, **options: Any) -> None:
        """Refuse what `attach_adapter` would refuse, before much time is spent.

        Raises:
            UserError: An option is out of range, or no module has a wanted name.
        """
        adapters.check(self, options)

    def attach_adapter(self, **options: Any) -> None:
        """Attach LoRA to linear modules of the decoder layers and freeze the rest.

        Args:
            options: As for `lit_prune.adapters.attach`.
        """
        self.adapter = adapters.attach(self, options)
        self.phase = "recovery"

    def finish(self) -> None:
        """Merge the adapter, if there is one; the model is then a plain one, in eval mode."""
        recovery.merge_lora(self.model)
        self.model.eval()
        self.phase = "done"

    def export(self, out: Any, card: str) -> bool:
        """Write the model as a Hugging Face checkpoint.

        Args:
            out: The folder to make.
            card: Text of its README.md.

        Returns:
            Whether it is stock; if not, it carries a modelling file of its own.
        """
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

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the model.

        Args:
            batch: `input_ids` and `attention_mask`, [batch, tokens].

        Returns:
            transformers' output, with `logits` [batch, tokens, vocabulary].
        """
        return self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token cross-entropy, or the loss that a callback set as `loss_term`."""
        output = self(batch)
        if self.loss_term is None:
            loss = cross_entropy(output.logits, batch["labels"])
        else:
            loss = self.loss_term(self, batch, output)
        # keys differ by phase, since the same key can't be logged in another way after a cut
        self.log(f"train/{self.phase}_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Perplexity over all validation tokens."""
        self._evaluate(batch, "val/perplexity")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Perplexity over all test tokens."""
        self._evaluate(batch, "test/perplexity")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The most likely next token at each position, [batch, tokens]."""
        return self(batch).logits.argmax(-1)

    def _evaluate(self, batch: Mapping[str, Tensor], key: str) -> None:
        self.perplexity.update(self(batch).logits, batch["labels"])
        self.log(key, self.perplexity, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained and its schedule, or what a callback set."""
        return (self.optimization_of or optimization)(self)

    def on_fit_start(self) -> None:
        """Put the model into training mode, which loading left it out of."""
        self.model.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is needed to build the model again before its weights are loaded."""
        checkpoint["lit_prune"] = state.saved(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the dense model into the shape that the checkpoint's weights have.

        Raises:
            UserError: The checkpoint is of another model.
        """
        self.configure_model()
        state.load(self, checkpoint.get("lit_prune"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunableLM:
        """Move or convert, but leave computed buffers and adapters their dtype."""
        with keeping_dtypes(self):
            super()._apply(fn, recurse)
        return self
