"""Environments of other people's clients, made once in .cache, so that they share no package with ours."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import environments

CACHE = Path(__file__).parents[2] / ".cache" / "clients"
PACKAGES = {
    "aiperf": ("aiperf==0.13.0",),
    "cohere": ("cohere==7.3.1",),
    "huggingface-hub": ("huggingface_hub==2.4.0", "numpy"),
    "langchain": ("langchain-openai==1.7.4",),
    "litellm": ("litellm==1.110.2",),
    "llama-index": ("llama-index-llms-nvidia-triton==0.6.0", "tritonclient[grpc]==2.73.0"),
    "llama-index-openai": ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like"),
    "lm-eval": ("lm_eval[api]==0.4.13", "transformers"),
    "mteb": ("mteb==2.26.24",),
    "ollama": ("ollama==0.6.3",),
    "playwright": ("playwright==1.65.2",),
    "upstream": (
        *("tritonclient[grpc,http]==2.73.0", "numpy<2", "pytest==9.2.0", "requests==2.34.2", "boofuzz==0.4.2"),
        *("sseclient-py==1.9.0", "openai==3.57.0", "httpx2==2.16.2", "pytest-asyncio==1.5.0"),
    ),
}


def environment(client: str) -> Path:
    """The folder of an environment's commands; it is made where it is missing or has other packages.

    Raises:
        AssertionError: a package could not be installed.
    """
    folder, packages = CACHE / client, PACKAGES[client]
    made = folder / "packages.txt"
    if not made.exists() or made.read_text(encoding="utf-8").split() != list(packages):
        made.unlink(missing_ok=True)
        python = environments.make(sys.executable, folder)
        environments.install(python, *packages)
        made.write_text("\n".join(packages), encoding="utf-8")
    return folder / "bin"
