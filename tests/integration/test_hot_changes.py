"""Models are added, changed and removed in a running server under load, and other models lose no request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, pipeline

from tests import tiny_models
from tests.integration.test_launcher import children
from trident_client import Client, NotFoundError, TridentError, UnavailableError, _wire, cli
from trident_client import _protocol as pb
from trident_client._grpc import STREAM
from trident_export import install, models_file
from trident_serving.launcher import local

TEXT = "The quick brown fox jumps over the lazy dog"


class Load:
    """Callers that ask again and again until they are told to stop; they leave the cores some time for the rest."""

    def __init__(self, ask: Callable[[], object], callers: int) -> None:
        self.answers: Counter[object] = Counter()
        self.errors: list[Exception] = []
        self._ask = ask
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._loop) for _ in range(callers)]
        for thread in self._threads:
            thread.start()

    def _loop(self) -> None:
        while not self._stop.wait(0.05):
            try:
                self.answers[self._ask()] += 1
            except TridentError as error:
                self.errors.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _until_refused(url: str, model: str) -> str:
    """Ask again and again, and hang up with the first error, as clients do; its message.

    A stream that is cancelled between an error and its end may stay in tritonserver 2.51, and hold its model.
    """
    request = _wire.build_request(
        model,
        {"text_input": _wire.texts(["Hello"])[None], "max_tokens": np.array([[100]], np.int32)},
    )
    with grpc.insecure_channel(url, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_stream(
            STREAM,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        while True:
            call = ask(request)
            for response in call:
                if response.error_message:
                    call.cancel()
                    return str(response.error_message)


def _classifier(folder: Path, name: str, seed: int) -> models_file.ModelSpec:
    path = folder / f"{name}-{seed}"
    tiny_models.make_reader(path, "bert", AutoModelForSequenceClassification, seed=seed, num_labels=3)
    limits = {"labels": 3, "max_tokens": 96, "threads": 1}
    table = {"task": "text-classification", "source": {"path": str(path)}, "variants": ["fp32"], "limits": limits}
    return models_file.parse(name, table)


def _score(folder: Path, name: str) -> float:
    pipe = pipeline("text-classification", model=str(folder / name), tokenizer=str(folder / name), device="cpu")
    score: float = pipe(TEXT)[0]["score"]
    return round(score, 4)


def test_new_changed_and_removed_models_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "repository"

    def export(*specs: models_file.ModelSpec) -> None:
        install.export(specs, repository, tmp_path, tmp_path / "cache", lambda message: None)

    generator: dict[str, Any] = {
        "task": "text-generation",
        "source": {"path": str(tiny_models.make_causal(tmp_path / "llama", "llama"))},
        "variants": ["fp32"],
        "limits": {"context": 128, "slots": 4, "threads": 1},
    }
    export(models_file.parse("base", generator), _classifier(tmp_path, "changing", 1))
    with local.running(repository, tmp_path / "log") as server, Client(server.grpc_url, timeout=60) as client:
        base = Load(lambda: client.generate("Hello", model="base", max_tokens=24).text, 3)
        changing = Load(lambda: round(client.classify(TEXT, model="changing")[0].score, 4), 2)
        before = _score(tmp_path, "changing-1")

        # A new model.
        export(_classifier(tmp_path, "new", 5))
        with pytest.raises(TridentError):
            client.classify(TEXT, model="new")
        assert cli.main(["load", "--url", server.grpc_url, "new"]) == 0
        assert capsys.readouterr().out == "loaded new_model, new_postprocess, new_tokenizer, new\n"
        assert round(client.classify(TEXT, model="new")[0].score, 4) == _score(tmp_path, "new-5")

        # A changed one.
        export(_classifier(tmp_path, "changing", 2))
        after = _score(tmp_path, "changing-2")
        assert before != after
        client.load("changing")
        assert round(client.classify(TEXT, model="changing")[0].score, 4) == after
        for _ in range(20):
            assert round(client.classify(TEXT, model="changing")[0].score, 4) == after

        # One that goes.
        assert client.unload("new") == ["new", "new_tokenizer", "new_postprocess", "new_model"]
        with pytest.raises((NotFoundError, UnavailableError)):
            client.classify(TEXT, model="new")
        with pytest.raises(NotFoundError, match="no exported model 'nothing'"):
            client.load("nothing")

        base.stop()
        changing.stop()

        # One that goes while clients hang up: it is unloaded all the same, and its process ends.
        with ThreadPoolExecutor(12) as pool:
            refused = [pool.submit(_until_refused, server.grpc_url, "base") for _ in range(12)]
            time.sleep(0.5)
            assert client.unload("base") == ["base"]
            assert all(each.result(30) for each in refused)
        assert [(each.state, each.reason) for each in client.models() if each.name == "base"] == [
            ("UNAVAILABLE", "unloaded")
        ]
        assert not [line for line in children(server.launcher.pid).values() if "/base/" in line]
        client.load("base")
        assert {client.generate("Hello", model="base", max_tokens=24).text} == set(base.answers)
    assert base.errors == []
    assert len(base.answers) == 1
    assert base.answers.total() > 20
    # The changed model was away for a moment, and never answered with the parts of two.
    assert all(isinstance(error, NotFoundError | UnavailableError) for error in changing.errors)
    assert set(changing.answers) == {before, after}
