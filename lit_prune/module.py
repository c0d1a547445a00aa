"""The LightningModule around a language model that is made smaller while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import TokenPerplexity
from lit_prune.fitting.resuming import go_on, settings
from lit_prune.loading import opening
from lit_prune.loading.pretrained import load_tokenizer
from lit_prune.prunable import Prunable
from lit_prune.recovery.schedule import OptimizerName, Shape, check_settings, optimization


class PrunableLM(Prunable):
    """A causal language model that callbacks can cut in the middle of a fit.

    It loads the Hugging Face model, brings loss and optimizer, and measures perplexity; what
    callbacks need of it is `lit_prune.Prunable`.

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
        self.perplexity = TokenPerplexity()

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, **options: Any) -> PrunableLM:
        """Wrap a model that is in memory already; it is cut in place.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            options: As for the class.
        """
        module = cls(opening.name_of(model), **{"dtype": "auto", **options})
        module.tokenizer = tokenizer
        module.adopt(model)
        module.model = model  # a submodule from here on
        module._enable_checkpointing()
        return module

    def _load_tokenizer(self) -> Any:
        return load_tokenizer(self.pretrained, **self.access)

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is not None:
            return
        opening.configure(self)
        self._enable_checkpointing()
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "check") and self.trainer.training:
            with torch.device("cpu"):  # Lightning calls this under the device of the model
                data.check("fit")  # before anything is cut, and now with the vocabulary's size

    def _enable_checkpointing(self) -> None:
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

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
        loss = self.loss(batch, self(batch))
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what training was asked to be like, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_prune"]["training"] = settings(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a fit go on with the learning rate and weight decay that are asked for now.

        Raises:
            UserError: The checkpoint is of another model or optimizer.
        """
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.training:
            go_on(checkpoint, settings(self))

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, and its schedule."""
        return optimization(self)
