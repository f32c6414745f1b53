"""Evaluates an embedder by mteb: python gateway_mteb.py URL MODEL FILE, whose lines have query and relevant.

The first line also has the passages, which are those of all: the file is one of `trident-export evaluate --dataset`.
"""

import json
import sys
from pathlib import Path

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.models import OpenAIAPIEncodeWrapper

url, model, file = sys.argv[1:]
rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


class Own(AbsTaskRetrieval):
    """A task of one's own: nothing is downloaded."""

    metadata = mteb.TaskMetadata(
        name="Own",
        description="questions and the passages that answer them",
        main_score="ndcg_at_10",
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        type="Retrieval",
        dataset={"path": "own/own", "revision": "1"},
    )

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        """Fill the only split."""
        passages = [{"id": str(row), "title": "", "text": text} for row, text in enumerate(rows[0]["passages"])]
        queries = [{"id": f"q{row}", "text": each["query"]} for row, each in enumerate(rows)]
        relevant = {f"q{row}": {str(right): 1 for right in each["relevant"]} for row, each in enumerate(rows)}
        split = {
            "corpus": Dataset.from_list(passages),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


encoder = OpenAIAPIEncodeWrapper(endpoint_url=url, model_name=model, use_chat_template=False)
results = mteb.evaluate(encoder, Own(), cache=None, encode_kwargs={"batch_size": 32})
(scores,) = results[0].scores["test"]
print(json.dumps({name: scores[name] for name in ("ndcg_at_10", "recall_at_10", "mrr_at_10")}))
