"""LightningCLI with this project's defaults, run folder and manners."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

import lit_prune
from lit_prune.cli.bar import add_bar
from lit_prune.cli.checkpoints import FOLDER
from lit_prune.cli.guard import causes, is_rank_zero, say
from lit_prune.cli.options import check_numbers, find_for_reading, list_callbacks, set_sparsity
from lit_prune.cli.parser import OneLineErrors
from lit_prune.cli.results import print_metrics, print_predictions
from lit_prune.cli.runfolder import RunFolder
from lit_prune.cli.runlog import Board, KeepMetrics, RunLog
from lit_prune.cli.saving import AtomicCheckpointIO, RunConfigCallback, add_checkpoints
from lit_prune.errors import UserError
from lit_prune.fitting.refit import STRATEGIES, check_strategy

DEFAULT_FOLDER = "lit-prune-run"
_DESCRIPTIONS = {
    "fit": "Prune a model, repair it, export it and report, all in one fit. Results go to "
    f"--trainer.default_root_dir, ./{DEFAULT_FOLDER} when it is not given.",
    "validate": "Measure --model.pretrained on the validation text.",
    "test": "Measure --model.pretrained on the test text.",
    "predict": "Run --model.pretrained on the prediction text.",
}
_TRAINER_DEFAULTS = {
    "default_root_dir": DEFAULT_FOLDER,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
_format_of_libraries = warnings.formatwarning
_LIBRARIES = r"(torch|lightning|transformers|peft|datasets|jsonargparse|torchdata)(\.|$)"


class PruneArgumentParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with complaints of one line."""


class PruneCLI(LightningCLI):
    """Runs one subcommand on a model and a data module, given as classes.

    Args:
        model_class: The LightningModule.
        datamodule_class: The LightningDataModule.
        args: The subcommand and its arguments.
    """

    folder: RunFolder | None = None

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        args: ArgsType = None,
    ) -> None:
        mark = f"lit_prune=={lit_prune.__version__}"
        commands: dict[str, Any] = {
            name: {"description": text, "dump_header": [mark]}
            for name, text in _DESCRIPTIONS.items()
        }
        super().__init__(
            model_class,
            datamodule_class,
            save_config_callback=RunConfigCallback,
            trainer_defaults=_TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": "lit-prune", "dump_header": [mark], **commands},
            parser_class=PruneArgumentParser,
            args=args,
            auto_configure_optimizers=False,
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            flags = {
                "--no-recovery": "stop after the cut: no training",
                "--overwrite": "replace the run that the folder holds",
                "--stock": "choose only what the stock config can express (model.stock)",
            }
            for flag, text in flags.items():
                parser.add_argument(flag, action="store_true", help=text)
            parser.add_argument(
                "--sparsity",
                type=float | None,
                help="share of the decoder's parameters to remove (the pruning callback's)",
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then settle what the shorthands mean."""
        if isinstance(args, Sequence):
            self.config = parser.parse_args(list(args))  # Lightning's own warns about sys.argv
        else:
            super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        check_numbers(config)
        list_callbacks(config)
        if config.get("weights_only", True) is None:
            config.weights_only = True  # else Lightning may decide to unpickle whatever is there
        if command == "fit":
            if config.no_recovery:
                config.trainer.max_steps = 0
            if config.stock:
                config.model.stock = True
            if config.sparsity is not None:
                set_sparsity(config)
            self.folder = RunFolder(
                config.trainer.default_root_dir,
                overwrite=config.overwrite,
                ckpt_path=config.ckpt_path,
            )
            config.ckpt_path = self.folder.ckpt_path
        else:
            find_for_reading(config)
            if config.trainer.limit_val_batches == 0:  # of a fit, which validates by itself
                config.trainer.limit_val_batches = None

    def instantiate_classes(self) -> None:
        """Make everything that the configuration names.

        Raises:
            UserError: What a part of it needs is not installed, as for most loggers.
        """
        try:
            super().instantiate_classes()
        except (ImportError, ValueError) as error:  # the second is jsonargparse's, made of others
            found = [link for link in causes(error) if isinstance(link, ImportError)]
            if not found or (found[0].name or "").startswith("lit_prune"):
                raise
            raise UserError(
                f"expected what the configuration needs to be installed: {found[0]}"
            ) from error

    def _parse_ckpt_path(self) -> None:
        path = self.config[self.config.subcommand].get("ckpt_path")
        try:
            super()._parse_ckpt_path()
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"expected a whole Lightning checkpoint as --ckpt_path, got {path}, which cannot "
                "be read: give an older one, or --overwrite to start anew"
            ) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        fits = self.subcommand == "fit"
        root = Path(config["default_root_dir"]).expanduser()
        config["callbacks"] = self._callbacks(config)
        if config.get("logger") in (None, True):
            config["logger"] = logs = [RunLog(root), Board(root)] if fits else False
            config["callbacks"] += [KeepMetrics(*logs)] if logs else []
        if fits:
            add_bar(config, callbacks)
            add_checkpoints(config, root / FOLDER)
            if config["strategy"] in StrategyRegistry:  # before what it needs is asked for
                check_strategy(StrategyRegistry[config["strategy"]]["strategy"])
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError) as error:  # nothing but the options has been looked at
            raise UserError(
                f"expected options that Lightning's Trainer accepts: {error}"
            ) from error
        strategy = trainer.strategy
        if isinstance(strategy.launcher, _MultiProcessingLauncher):
            raise UserError(
                "expected a strategy whose processes each run the command, such as ddp, got "
                f"{config['strategy']}, which would leave the pruned model in its workers"
            )
        if fits:
            check_strategy(type(strategy))
        if isinstance(strategy, STRATEGIES) and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        """Those of the configuration, without recovery where nothing is trained after the cut."""
        given = config.get("callbacks") or []
        if config.get("max_steps") != 0:
            return given
        kept = [callback for callback in given if not getattr(callback, "is_recovery", False)]
        if self.subcommand == "fit" and self.config["fit"].no_recovery:
            # some train before they cut
            steps = max((getattr(callback, "last_step", 0) for callback in kept), default=0)
            config["max_steps"] = steps
            if steps:
                self._note_without_recovery(given, steps)
        return kept

    def _note_without_recovery(self, callbacks: list[Callback], steps: int) -> None:
        """Have the configuration that is written say what `--no-recovery` comes to.

        With steps in it recovery is not left out any more, as it is with none.
        """
        options = self.config["fit"].trainer
        options.callbacks = [
            item
            for item, callback in zip(options.callbacks, callbacks, strict=True)
            if not getattr(callback, "is_recovery", False)
        ]
        options.max_steps = steps

    def _run_subcommand(self, subcommand: str) -> None:
        if self.folder is None:
            super()._run_subcommand(subcommand)
            return
        if not self.config[subcommand].trainer.callbacks and is_rank_zero():
            say("no callback prunes: name a configuration that does, such as --config fasp")
        with self.folder:
            super()._run_subcommand(subcommand)

    def validate(self, **kwargs: Any) -> None:
        """Measure on the validation text and print what was measured."""
        results = self.trainer.validate(**{**kwargs, "verbose": False})
        print_metrics("validate", results, _protocol(self.datamodule, "validation"))

    def test(self, **kwargs: Any) -> None:
        """Measure on the test text and print what was measured."""
        results = self.trainer.test(**{**kwargs, "verbose": False})
        print_metrics("test", results, _protocol(self.datamodule, "test"))

    def predict(self, **kwargs: Any) -> None:
        """Run on the prediction text and print what came out."""
        print_predictions(self.trainer.predict(**kwargs))


def run(args: Sequence[str]) -> None:
    """Run a subcommand of the trainer.

    Args:
        args: The subcommand and its arguments.

    Raises:
        UserError: A mistake in what was asked.
    """
    from lit_prune.data import TextDataModule
    from lit_prune.module import PrunableLM

    quiet()
    PruneCLI(PrunableLM, TextDataModule, list(args))


def quiet() -> None:
    """Silence advice of the libraries that a user can do nothing about; our own is one line."""
    warnings.formatwarning = _formatted
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *line: Any
) -> str:
    if Path(filename).is_relative_to(Path(lit_prune.__file__).parent):
        return f"lit-prune: {message}\n"
    return _format_of_libraries(message, category, filename, lineno, *line)


def _protocol(data: Any, role: str) -> dict[str, Any]:
    """What was measured on, from a data module that can tell."""
    return data.protocol(role) if hasattr(data, "protocol") else {}
