"""The LightningModule around a language model that is made smaller while it trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_prune import recovery, state
from lit_prune.distillation import cross_entropy
from lit_prune.dtypes import DTYPES, keeping_dtypes
from lit_prune.errors import UserError
from lit_prune.evaluation import TokenPerplexity
from lit_prune.export import export_checkpoint, read_lineage
from lit_prune.pretrained import load_pretrained, load_tokenizer, resolve
from lit_prune.refit import refit
from lit_prune.schedule import warmup_cosine
from lit_prune.structure import Layout, Structure, Widths, settle

Phase = Literal["dense", "pruned", "recovery", "done"]


class LossTerm(Protocol):
    """Computes a training loss from a batch and the model's output, in place of cross-entropy."""

    def __call__(self, module: Any, batch: Mapping[str, Tensor], output: Any) -> Tensor:
        """The loss of a batch, []."""
        ...


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
        warmup: Share of the steps in which the rate rises, before it falls as a cosine.
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
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
        if not (learning_rate >= 0 and weight_decay >= 0 and 0 <= warmup <= 1):
            raise UserError(
                "expected learning_rate and weight_decay of at least 0 and warmup from 0 to 1, got "
                f"{learning_rate:g}, {weight_decay:g} and {warmup:g}"
            )
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.access = {"trust_remote_code": trust_remote_code, "token": token}
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.stock = stock
        self.optimization: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        self.warmup = warmup
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
        self.keep_teacher = False
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
        module._adopt(model)
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
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None) or tokens
        if tokens <= limit:
            return
        message = f"expected {what} of at most {limit} tokens, the model's context, got {tokens}"
        if "position" in self.structure.widths.shared:
            raise UserError(f"{message}; set a shorter length")
        rank_zero_warn(f"{message}: the figures will say little")

    @property
    def teacher(self) -> nn.Module | None:
        """The dense model, if `keep_teacher` was set before the first cut."""
        return self._outside.get("teacher")

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is not None:
            return
        model, tokenizer = load_pretrained(
            self.pretrained,
            dtype=DTYPES[self.dtype_name],
            attn_implementation=self.attn_implementation,
            **self.access,
        )
        self._outside.setdefault("tokenizer", tokenizer)
        widths = None
        source = resolve(self.pretrained)
        if source.local and source.gguf is None:
            record = read_lineage(source.place)
            self.lineage = list(record["lineage"])
            if record["layout"] is not None:
                saved = record["layout"]["widths"]
                widths = Widths(saved["shared"], saved["layers"])
        self._adopt(model, widths)
        self.is_stock = widths is None or settle(model, self.structure, self.layout)
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "check") and self.trainer.training:
            with torch.device("cpu"):  # Lightning calls this under the device of the model
                data.check("fit")  # before anything is cut, and now with the vocabulary's size

    def _adopt(self, model: Any, widths: Widths | None = None) -> None:
        self.structure = Structure.of(model, widths)
        self.layout = Layout.full(self.structure.widths)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model

    # --- cutting -------------------------------------------------------------------------------

    def recut(self, trainer: Trainer, change: Callable[[], Layout | None]) -> None:
        """Change the model's shape in the middle of a fit, and everything that depends on it.

        Callbacks with a method `on_before_cut` or `on_after_cut` (trainer, module) are told.

        Args:
            trainer: The trainer that fits this module.
            change: Cuts the model in place and returns what stays, in the numbering of the model
                before it; or changes something else, such as adapters, and returns None.
        """
        self._tell(trainer, "on_before_cut")
        self._make_teacher()
        self.first_step = trainer.global_step
        was_cut = refit(trainer, lambda: self._change(change))
        if was_cut:
            self._tell(trainer, "on_after_cut")

    def _change(self, change: Callable[[], Layout | None]) -> bool:
        start = time.perf_counter()
        layout = change()
        if layout is None:
            return False
        self.is_stock = settle(self.model, self.structure, layout)
        self.layout = self.layout.then(layout)
        self.phase = "pruned"
        self.seconds["calibrate_and_prune"] = time.perf_counter() - start
        return True

    def _tell(self, trainer: Trainer, event: str) -> None:
        for callback in cast(Any, trainer).callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(trainer, self)

    def _make_teacher(self) -> None:
        if not self.keep_teacher or self.teacher is not None or self.phase != "dense":
            return
        self._outside["teacher"] = copy.deepcopy(self.model).eval().requires_grad_(False)

    def require_teacher(self) -> nn.Module:
        """The dense model on this module's device, loaded again if a resumed run has none.

        Raises:
            UserError: The model was given in memory and is cut, and no copy was kept.
        """
        self._make_teacher()
        if self.teacher is None and "given" in self._outside:
            raise UserError(
                "expected the dense model to be at hand, got a model given in memory that was cut "
                "without a copy; set keep_teacher = True on the module before the fit"
            )
        if self.teacher is None:
            model, _ = load_pretrained(
                self.pretrained,
                dtype=DTYPES[self.dtype_name],
                attn_implementation=self.attn_implementation,
                **self.access,
            )
            self._outside["teacher"] = model.eval().requires_grad_(False)
        with keeping_dtypes(self._outside["teacher"]):  # the trainer may have cast the student
            return self._outside["teacher"].to(self.device, self.model.dtype)

    # --- recovery ------------------------------------------------------------------------------

    def check_adapter(self, **options: Any) -> list[str]:
        """Find the modules that an adapter goes to; what it is made with is checked too.

        Args:
            options: As for `attach_adapter`.

        Returns:
            Their paths.

        Raises:
            UserError: An option is out of range, or no module has a wanted name.
        """
        wanted = set(options["targets"])
        paths = [
            site.path
            for site in self.structure.sites(self.model)
            if site.layer is not None and site.line.reads is not None
        ]
        chosen = [path for path in paths if not wanted or path.rpartition(".")[2] in wanted]
        if not chosen:
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise UserError(f"expected LoRA targets out of {', '.join(names)}, got {wanted}")
        ranges = {name: options[name] for name in ("rank", "alpha", "dropout")}
        recovery.check_lora(self.model, targets=chosen, **ranges)
        return chosen

    def attach_adapter(self, **options: Any) -> None:
        """Attach LoRA to linear modules of the decoder layers and freeze the rest.

        Args:
            options: `rank`, `alpha`, `dropout`, `dtype` (a name) and `seed` as for
                `lit_prune.recovery.attach_lora`; `targets` are names of modules, empty for all.
        """
        chosen = self.check_adapter(**options)
        dtype = DTYPES.get(options["dtype"]) or self.model.dtype
        arguments = {**options, "targets": chosen, "dtype": dtype}
        recovery.attach_lora(self.model, **arguments)
        # written out, since "auto" may mean another when this is read
        self.adapter = {**options, "dtype": str(dtype).removeprefix("torch.")}
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
        """AdamW over what is trained, with a linear warm-up and a cosine to zero."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, **self.optimization)
        steps = self.trainer.max_steps and int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, max(steps - self.first_step, 1), self.warmup)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

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
        self._make_teacher()  # before the cut
        state.load(self, checkpoint.get("lit_prune"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunableLM:
        """Move or convert, but leave computed buffers and adapters their dtype."""
        with keeping_dtypes(self):
            super()._apply(fn, recurse)
        return self
