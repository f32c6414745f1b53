"""What several files of this folder share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import gateways, tiny_models
from tests.gateways import Gateway
from tests.integration.test_messages import chain, tokenizer
from trident_client import Client
from trident_export import install, models_file
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

GATEWAY_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def gateway_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders: `chain` thinks and calls a tool, `talk` writes anything, and one of each encoder task."""
    root = tmp_path_factory.mktemp("gateway-models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chain().save_pretrained(root / "chain")
    tokenizer().save_pretrained(root / "chain")
    (root / "chain" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    words = tiny_models.byte_level_tokenizer()
    words.chat_template = GATEWAY_CHAT
    torch.manual_seed(0)
    talk = AutoModelForCausalLM.from_config(tiny_models.causal_config("llama", 2048)).eval()
    with torch.no_grad():
        for parameter in talk.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    talk.save_pretrained(root / "talk")
    words.save_pretrained(root / "talk")
    tiny_models.make_reader(root / "embed", "xlm-roberta", AutoModel, seed=1)
    classifier = AutoModelForSequenceClassification
    tiny_models.make_reader(root / "rank", "bert", classifier, seed=2, num_labels=1)
    tiny_models.make_reader(root / "classify", "bert", classifier, seed=3, num_labels=3)
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="session")
def gateway_server(gateway_folder: Path) -> Iterator[LocalServer]:
    """The models behind a real server."""
    tables: dict[str, dict[str, Any]] = {
        "chain": {"task": "text-generation", "limits": {"context": 512, "slots": 4, "threads": 1}},
        "talk": {"task": "text-generation", "limits": {"context": 2048, "slots": 4, "max_waiting": 8, "threads": 1}},
    }
    shared = {"max_tokens": 96, "buckets": [32], "threads": 1}
    tables["embed"] = {"task": "feature-extraction", "limits": {**shared, "dimensions": 32, "matryoshka": [8]}}
    tables["rank"] = {"task": "text-ranking", "limits": {**shared, "labels": 1}}
    tables["classify"] = {"task": "text-classification", "limits": {**shared, "labels": 3}}
    for name, table in tables.items():
        table |= {"source": {"path": str(gateway_folder / name)}, "variants": ["fp32"]}
    specs = [models_file.parse(name, table) for name, table in tables.items()]
    repository = gateway_folder / "repository"
    install.export(specs, repository, gateway_folder, gateway_folder / "cache", lambda message: None)
    with local.running(repository, gateway_folder / "log") as running:
        yield running


@pytest.fixture(scope="session")
def gateway(gateway_server: LocalServer, gateway_folder: Path) -> Iterator[Gateway]:
    """A gateway as it starts without any option."""
    with gateways.running(gateway_folder / "gateway.log", gateway_server.grpc_url) as running:
        yield running


@pytest.fixture
def direct(gateway_server: LocalServer) -> Iterator[Client]:
    """Our own client, past the gateway."""
    with Client(gateway_server.grpc_url, timeout=60) as connected:
        yield connected
