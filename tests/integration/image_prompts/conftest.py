"""Two models that read images behind one server, which the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import gateways, image_prompts
from tests.conftest import on_one_thread
from tests.gateways import Gateway
from trident_client import Client
from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer


@pytest.fixture(scope="session")
def image_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that read images, in the folder `repository` of this one, which has their Hugging Face folders too."""
    root = tmp_path_factory.mktemp("images")
    with on_one_thread():
        image_prompts.export_models(root)
    return root


@pytest.fixture(scope="session")
def image_server(image_models: Path) -> Iterator[LocalServer]:
    """Both behind a real server."""
    with local.running(image_models / "repository", image_models / "log") as running:
        yield running


@pytest.fixture(scope="session")
def image_gateway(image_server: LocalServer, image_models: Path) -> Iterator[Gateway]:
    """A gateway in front of it."""
    with gateways.running(image_models / "gateway.log", image_server.grpc_url) as running:
        yield running


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, image_models: Path) -> Path:
    """The Hugging Face folder of the model that a file of tests names as `MODEL`."""
    found: Path = image_models / request.module.MODEL
    return found


@pytest.fixture(scope="module")
def repository(image_models: Path) -> Path:
    """Triton's, of both models."""
    return image_models / "repository"


@pytest.fixture
def client(image_server: LocalServer) -> Iterator[Client]:
    """Connected to the server of both models."""
    with Client(image_server.grpc_url, timeout=60) as connected:
        yield connected
