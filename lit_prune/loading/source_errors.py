"""What transformers and the hub raise for a bad model source, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub

from lit_prune.errors import UserError


def only_pickles(place: str) -> UserError:
    """The error for a model without safetensors weights.

    Args:
        place: Where they were looked for.
    """
    return UserError(
        f"expected safetensors weights, got {place} with none: pickled files are not loaded since "
        f"they can run code; convert it with transformers' save_pretrained"
    )


@contextmanager
def said_in_one_line(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a bad source into a UserError.

    Args:
        source: What the user gave.

    Raises:
        UserError: Instead of what was raised inside.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, hub.StrictDataclassError) as error:
        raise _explained(source, error) from error


def _explained(source: str, error: BaseException) -> UserError:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = str(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if caused_by(hub.GatedRepoError):
        return UserError(
            f"expected access to {source}, got refused: it is gated; accept its licence on the "
            f"hub, log in with `hf auth login` and pass --model.token true"
        )
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
        return UserError(
            f"expected a local folder, a .gguf file or a hub id, got {source}, which is none; "
            f"check the name (a private model needs --model.token true)"
        )
    if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) or "connect to" in text:
        here = "" if Path(source).exists() else ", nor a folder of that name"
        return UserError(
            f"expected {source} on the hub or in its local cache, got no connection and no copy"
            f"{here}; check the name, the network and HF_HUB_OFFLINE, or give a local folder"
        )
    if "trust_remote_code" in text:
        return UserError(
            f"expected a model that transformers knows, got {source}, which brings code of its "
            f"own; read it, then pass --model.trust_remote_code true"
        )
    if "safetensors" in text and "file named" in text:
        return only_pickles(source)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, hub.StrictDataclassError):  # its first line names the check only
        first = text.strip().splitlines()[-1].strip()
    return UserError(f"expected a causal language model, got {source}: {first[:300]}")
