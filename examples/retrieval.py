"""Which passages of a folder's text files answer a question: embeddings find candidates, a ranker orders them.

python examples/retrieval.py examples/texts "How do bees keep warm?"
python examples/retrieval.py examples/texts "How do bees keep warm?" --ranker reranker

The second step takes any model of the task text-ranking, by its name or as the server's only one. Without one the order
is that of the embeddings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trident_client import Client, NotFoundError


def main() -> None:
    """Print the best passages, the best first, with the files that they are from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--embedder", help="the server's only embedder if it is left out")
    parser.add_argument("--ranker", help="the server's only ranker if it is left out")
    parser.add_argument("--candidates", type=int, default=20, help="passages that the ranker reads")
    parser.add_argument("--top", type=int, default=3)
    options = parser.parse_args()
    found = [(file.name, text) for file in sorted(options.folder.glob("*.txt")) for text in passages(file)]
    if not found:
        sys.exit(f"{options.folder} has no text in *.txt files")
    texts = [text for _, text in found]
    with Client(options.url) as client:
        # Embeddings have length 1, so a product of two is their cosine. A folder that is asked often keeps its own.
        vectors = client.embed(texts, model=options.embedder, truncate=True)
        cosines = vectors @ client.embed(options.question, model=options.embedder, truncate=True)
        best = [(int(place), float(cosines[place])) for place in cosines.argsort()[::-1][: options.candidates]]
        try:
            candidates = [texts[place] for place, _ in best]
            ranked = client.rank(options.question, candidates, model=options.ranker, truncate=True)
            best = [(best[each.index][0], each.score) for each in ranked]
        except NotFoundError as error:
            print(f"not ranked again: {error}", file=sys.stderr)
    for place, score in best[: options.top]:
        name, text = found[place]
        print(f"{score:.4f}\t{name}\t{' '.join(text.split())}")


def passages(file: Path) -> list[str]:
    """The paragraphs of a file."""
    return [part for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]


if __name__ == "__main__":
    main()
