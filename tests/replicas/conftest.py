"""The servers and the Envoy that these tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replicas.fleet import Callers, Fleet, Proxy, make_models, proxy
from tests.unit.test_client_servers import certificates

__all__ = ["certificates"]  # a fixture


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def fleet(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(repository, tmp_path_factory.mktemp("fleet"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def envoy(fleet: Fleet, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with proxy(fleet, certificates, tmp_path_factory.mktemp("envoy")) as made:
        yield made


@pytest.fixture(scope="session")
def callers(envoy: Proxy) -> Iterator[Callers]:
    made = Callers(envoy)
    yield made
    made.close()
