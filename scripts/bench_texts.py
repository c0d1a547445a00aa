"""Writes the bench's texts in the manner of the tokenised WikiText-2: `<unk>` for rare words.

Many published figures of WikiText-2 belong to that text, on which perplexities and what pruning
makes of them are lower than on the raw one. This is an imitation: words are counted over the two
files, not over the whole training text, so that more of them are rare. To run a bench on it::

    python scripts/bench_texts.py --data DIR --out DIR2
    python scripts/bench_methods.py run --data DIR2 --out RESULTS
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

NAMES = ("wikitext2-train-head.txt", "wikitext2-test.txt")
OFTEN = 3


def with_unknown(texts: list[str], often: int = OFTEN) -> list[str]:
    """The texts with `<unk>` for words that occur less than `often` times in all of them."""
    counts = Counter(word for text in texts for word in text.split())
    rare = {word for word, count in counts.items() if count < often}
    return [re.sub(r"\S+", lambda m: "<unk>" if m[0] in rare else m[0], t) for t in texts]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    given = parser.parse_args()
    missing = [name for name in NAMES if not (given.data / "text" / name).is_file()]
    if missing:
        print(f"error: expected {missing[0]} in {given.data}/text, got no file", file=sys.stderr)
        return 2
    (given.out / "text").mkdir(parents=True, exist_ok=True)
    raw = [(given.data / "text" / name).read_text(encoding="utf-8") for name in NAMES]
    for name, text in zip(NAMES, with_unknown(raw), strict=True):
        (given.out / "text" / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
