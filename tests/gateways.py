"""Gateways of the tests: real processes on free ports, and the models behind them."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trident_serving.artefacts import VERSION, manifest_path
from trident_serving.launcher.local import free_ports

if TYPE_CHECKING:
    from trident_serving.guard.rules import Guard


@dataclass(frozen=True)
class Gateway:
    """A gateway that answers.

    Attributes:
        process: of the command.
        log: the file with its access log and what it says on standard error.
    """

    port: int
    process: subprocess.Popen[str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entries(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, seconds: float = 60
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of a request; a body makes it a POST."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, content, sent)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, _lower(response.headers), _json(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _lower(error.headers), _json(error.read())

    def connect(self, seconds: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


@contextlib.contextmanager
def running(log: Path, *triton: str, flags: tuple[str, ...] = (), ready: bool = True) -> Iterator[Gateway]:
    """A gateway in front of servers."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "trident_gateway", "--port", str(port), *flags]
    for address in triton:
        command += ["--triton", address]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
    gateway = Gateway(port, process, log)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                if gateway.ask("/ready")[0] == 200 or not ready:
                    break
            time.sleep(0.05)
        yield gateway
    finally:
        process.terminate()
        process.wait(60)


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def make_talk(folder: Path) -> None:
    """A model that writes anything, with a chat template."""
    # Here, as below, because collecting tests needs none of this, which takes seconds.
    import torch
    from transformers import AutoModelForCausalLM

    from tests import tiny_models

    words = tiny_models.byte_level_tokenizer()
    words.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    talk = AutoModelForCausalLM.from_config(tiny_models.causal_config("llama", 2048)).eval()
    with torch.no_grad():
        for parameter in talk.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    talk.save_pretrained(folder)
    words.save_pretrained(folder)


def make_models(root: Path) -> None:
    """Hugging Face folders: `chain` thinks and calls a tool, `talk` writes anything, and one of each encoder task."""
    # Here, because most tests need none of this, which takes seconds.
    from peft import LoraConfig
    from transformers import (
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from tests import tiny_models
    from tests.integration.test_messages import chain, tokenizer
    from tests.unit.test_adapters import adapter

    chain().save_pretrained(root / "chain")
    tokenizer().save_pretrained(root / "chain")
    (root / "chain" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    make_talk(root / "talk")
    adapter(root / "other", root / "talk", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny_models.make_reader(root / "embed", "xlm-roberta", AutoModel, seed=1)
    classifier = AutoModelForSequenceClassification
    tiny_models.make_reader(root / "rank", "bert", classifier, seed=2, num_labels=1)
    tiny_models.make_reader(root / "classify", "bert", classifier, seed=3, num_labels=3)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: row for row, name in enumerate(LABELS)}}
    tiny_models.make_reader(root / "tag", "bert", AutoModelForTokenClassification, seed=4, **names)


def export_models(root: Path) -> Path:
    """Their repository."""
    from trident_export import install, models_file

    tables: dict[str, dict[str, Any]] = {
        "chain": {"task": "text-generation", "limits": {"context": 512, "slots": 4, "threads": 1}},
        "talk": {"task": "text-generation", "limits": {"context": 2048, "slots": 4, "max_waiting": 8, "threads": 1}},
    }
    shared = {"max_tokens": 96, "buckets": [32], "threads": 1}
    tables["embed"] = {"task": "feature-extraction", "limits": {**shared, "dimensions": 32, "matryoshka": [8]}}
    tables["rank"] = {"task": "text-ranking", "limits": {**shared, "labels": 1}}
    tables["classify"] = {"task": "text-classification", "limits": {**shared, "labels": 3}}
    tables["tag"] = {"task": "token-classification", "limits": {**shared, "labels": len(LABELS)}}
    tables["talk"]["adapters"] = {"other": str(root / "other")}
    tables["tag"]["explain"] = {"max_runs": 40}
    tables["talk"]["explain"] = True
    for name, table in tables.items():
        table |= {"source": {"path": str(root / name)}, "variants": ["fp32"]}
    tables["translate"] = {"task": "translation", "generator": "talk", "target_lang": "German"}
    tables["translate"]["template"] = "To {{ target_lang }}: {{ text_input }}"
    specs = [models_file.parse(name, table) for name, table in tables.items()]
    install.export(specs, root / "repository", root, root / "cache", lambda message: None)
    return root / "repository"


def install_guarded(repository: Path, name: str, graph: str, guard: Guard) -> None:
    """The artefacts of a generator of theirs under another name, with a config that has a guard."""
    from trident_export import configs, models_file

    limits = {"context": 512 if graph == "chain" else 2048, "slots": 4, "max_waiting": 8, "threads": 1}
    table = {"task": "text-generation", "source": {"path": "x"}, "variants": ["fp32"], "limits": limits}
    spec = models_file.parse(name, table | {"guard": "g"}, guards={"g": guard})
    configs.write(spec, repository, {})
    shutil.copytree(repository / graph / VERSION, repository / name / VERSION)
    file = manifest_path(repository, name)
    told = json.loads(file.read_text()) | {"name": name, "triton_models": [name], "public_models": {"fp32": name}}
    file.write_text(json.dumps(told))
