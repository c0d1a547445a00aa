"""`lit-prune prune-streaming`: prune a model larger than memory, from files to files."""

from __future__ import annotations

import resource
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.table import Table

from lit_prune.cli.guard import say
from lit_prune.cli.main import PruneArgumentParser, quiet
from lit_prune.cli.options import list_callbacks, set_sparsity
from lit_prune.console import stdout_console
from lit_prune.data import TextDataModule
from lit_prune.errors import UserError
from lit_prune.module import PrunableLM
from lit_prune.pruning import PruningCallback
from lit_prune.reporting.report import load_lines
from lit_prune.streaming.prune import prune_streaming

_DESCRIPTION = (
    "Prune a model larger than memory, layer by layer from its safetensors files to those of "
    "--out, with the configuration of a fit. Nothing is trained or measured: recover the result "
    "in a fit of its own, where it fits into memory. Of the trainer's options only the pruning "
    "callback counts."
)
#: Options of `fit` that mean nothing here, so that the configuration of a run can be given.
_OF_FIT = ("no_recovery", "overwrite", "ckpt_path", "weights_only")
#: Those of them that ask for something that is not done.
_UNMET = ("no_recovery", "overwrite", "ckpt_path")
_WIDTH = 110  # of a table where there is no terminal


class StreamingCLI(LightningCLI):
    """Reads what `fit` reads, and makes the model, the data and the callbacks of it.

    Args:
        args: The arguments.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.callbacks: list[Any] = []
        super().__init__(
            PrunableLM,
            TextDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": "lit-prune prune-streaming", "description": _DESCRIPTION},
            parser_class=PruneArgumentParser,
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is asked for here alone, and shorthands of `fit`."""
        parser.add_argument("--out", type=str, required=True, help="the folder to make")
        text = "share of the decoder's parameters to remove (the pruning callback's)"
        parser.add_argument("--sparsity", type=float | None, help=text)
        text = "choose only what the stock config can express (model.stock)"
        parser.add_argument("--stock", action="store_true", help=text)
        for name in _OF_FIT:
            parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then settle what the shorthands mean."""
        self.config = parser.parse_args(args)
        for name in _UNMET:
            value = self.config[name]
            if value not in (None, False):
                raise UserError(
                    f"expected prune-streaming without {name}, got {value}: it makes a new folder, "
                    "goes on from no checkpoint and never trains; leave it out"
                )
        if self.config.stock:
            self.config.model.stock = True
        list_callbacks(self.config)
        if self.config.sparsity is not None:
            set_sparsity(self.config)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        self.callbacks = config.get("callbacks") or []
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)

    def pruning(self) -> PruningCallback:
        """The callback that prunes; if there are others, a line says that they are not used.

        Raises:
            UserError: There is none, or more than one.
        """
        found = [callback for callback in self.callbacks if isinstance(callback, PruningCallback)]
        if len(found) != 1:
            raise UserError(
                f"expected one pruning callback (a PruningCallback), got {len(found)}; name a "
                "configuration that prunes, such as --config fasp"
            )
        if len(self.callbacks) > 1:
            name = type(found[0]).__name__
            say(f"nothing is trained or measured here: of the callbacks only {name} is used")
        return found[0]


def run_streaming(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        UserError: A mistake in what was asked.
    """
    quiet()
    cli = StreamingCLI(args)
    out = Path(cli.config.out).expanduser()
    found = prune_streaming(cli.model, cli.pruning(), cli.datamodule, out)
    _print(found, out)


def _print(found: Mapping[str, Any], out: Path) -> None:
    console = stdout_console(_WIDTH)
    sparsity = found["sparsity"]
    table = Table(title=out.name)
    table.add_column("axis")
    for column in ("dense", "kept"):
        table.add_column(column, justify="right")
    for axis, sizes in found["widths"].items():
        table.add_row(axis, _span(sizes["dense"]), _span(sizes["kept"]))
    console.print(table)
    kind = "stock" if found["stock"] else "not stock: it carries a modelling file"
    for line in (
        f"removed: {sparsity['decoder']:.2%} of the decoder's parameters, "
        f"{sparsity['total']:.2%} of all",
        f"calibrated and pruned in {found['seconds']:.1f} s, peak memory of the process "
        f"{_peak_mib():,.0f} MiB",
        f"checkpoint: {kind}",
        "load it in plain transformers:",
        *load_lines(out, stock=found["stock"]).splitlines(),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _span(widths: int | Sequence[int]) -> str:
    """Widths that may differ from layer to layer."""
    if isinstance(widths, int):
        return f"{widths:,}"
    return f"{min(widths):,} to {max(widths):,}"


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
