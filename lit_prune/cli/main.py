"""LightningCLI with this project's defaults, run folder and manners."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

import lit_prune
from lit_prune.cli.checkpoints import FOLDER, find_checkpoint
from lit_prune.cli.guard import is_rank_zero, say
from lit_prune.cli.parser import OneLineErrors
from lit_prune.cli.results import print_metrics, print_predictions
from lit_prune.cli.runfolder import RunFolder
from lit_prune.cli.runlog import KeepMetrics, RunLog
from lit_prune.cli.saving import (
    AtomicCheckpointIO,
    RunConfigCallback,
    add_checkpoints,
)
from lit_prune.errors import UserError
from lit_prune.refit import STRATEGIES, check_strategy

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
        _check_numbers(config)
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
            _find_for_reading(config)
            if config.trainer.limit_val_batches == 0:  # of a fit, which validates by itself
                config.trainer.limit_val_batches = None

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
        given = config.get("callbacks") or []
        config["callbacks"] = given if isinstance(given, list) else [given]
        if config.get("logger") in (None, True):
            config["logger"] = log = RunLog(root) if fits else False
            config["callbacks"] += [KeepMetrics(log)] if log else []
        if config.get("max_steps") == 0:
            config["callbacks"] = [
                callback
                for callback in config["callbacks"]
                if not getattr(callback, "is_recovery", False)
            ]
            if fits and self.config["fit"].no_recovery:
                steps = [getattr(callback, "last_step", 0) for callback in config["callbacks"]]
                config["max_steps"] = max(steps, default=0)  # some train before they cut
        if fits:
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
    """Silence advice of the libraries that a user of this command can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)


def _check_numbers(config: Any) -> None:
    """Refuse what the libraries answer with a traceback."""
    seed, accumulated = config.seed_everything, config.trainer.accumulate_grad_batches
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise UserError(f"expected --seed_everything from 0 to {2**32 - 1}, got {seed}")
    if accumulated < 1:
        raise UserError(
            f"expected --trainer.accumulate_grad_batches of at least 1, got {accumulated}"
        )


def _protocol(data: Any, role: str) -> dict[str, Any]:
    """What was measured on, from a data module that can tell."""
    return data.protocol(role) if hasattr(data, "protocol") else {}


def _find_for_reading(config: Any) -> None:
    """Resolve the checkpoint that validate, test or predict shall read."""
    folder, wanted = Path(config.trainer.default_root_dir), config.ckpt_path
    config.ckpt_path, passed = find_checkpoint(folder, wanted)
    if passed:
        say(f"{'; '.join(passed)}: reading {config.ckpt_path}")
    if wanted and not config.ckpt_path:
        raise UserError(
            f"expected {folder}/checkpoints/last.ckpt, which does not exist: name the run's folder "
            "with --trainer.default_root_dir"
        )


def set_sparsity(config: Any) -> None:
    """Hand the shorthand's value to the pruning callback.

    Args:
        config: The parsed arguments of a command.

    Raises:
        UserError: There is none, or more than one, or its sparsity would not count.
    """
    callbacks = config.trainer.callbacks or []
    targets = [item for item in callbacks if "sparsity" in (item.get("init_args") or {})]
    if len(targets) != 1:
        raise UserError(
            f"expected one callback that takes a sparsity, got {len(targets)}; name a "
            "configuration that prunes, such as --config fasp, before --sparsity"
        )
    owner: Any = locate(targets[0].class_path)
    instead = getattr(owner, "instead_of_sparsity", lambda options: None)(targets[0].init_args)
    if instead is not None:
        raise UserError(
            f"expected --sparsity or {instead}, which says how much goes in its place, got both; "
            f"leave out --sparsity or set {instead} to null"
        )
    targets[0].init_args.sparsity = config.sparsity
