"""The peers of `make bench` run in processes of their own: what fails there is a line in the table."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import bench, generation, processor
from benchmarks.peers import child, environments, process
from benchmarks.peers.environments import Environment, PeerError
from benchmarks.peers.process import PeerProcess
from benchmarks.peers.programs import folders
from tests import tiny_models

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_causal(tmp_path_factory.mktemp("peers") / "llama", "llama")


@pytest.fixture(scope="module")
def peer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeerProcess]:
    folder = tmp_path_factory.mktemp("work")
    started = PeerProcess(Path(sys.executable), "transformers-fp32", source, folder / "models", folder / "log")
    yield started
    started.close()


def test_every_peer_has_an_environment() -> None:
    listed = [name for each in environments.load() for name in (*each.generators, *each.embedders)]
    assert sorted(listed) == sorted(child.PEERS)
    folder = Path(child.__file__).parent / "programs"
    assert {module for module, _, _ in child.PEERS.values()} == {file.stem for file in folder.glob("[!_]*.py")} - {
        "folders"
    }


def test_a_folder_for_transformers_4(source: Path, tmp_path: Path) -> None:
    older = folders.for_transformers_4(source, tmp_path)
    config = json.loads((older / "config.json").read_text())
    assert "rope_parameters" not in config
    assert config["rope_theta"] == json.loads((source / "config.json").read_text())["rope_parameters"]["rope_theta"]
    settings = json.loads((older / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise ValueError("no")

    def convert(folder: Path) -> None:
        assert not folder.exists()
        folder.mkdir()

    with pytest.raises(ValueError, match="no"):
        folders.converted(tmp_path / "made", fail)
    assert folders.converted(tmp_path / "made", convert) == tmp_path / "made"
    assert folders.converted(tmp_path / "made", fail) == tmp_path / "made"


def test_a_choice_of_peers_has_what_they_are_compared_with() -> None:
    assert [each.name for each in environments.selected(["ctranslate2"])] == ["transformers", "ctranslate2"]
    assert environments.selected([]) == environments.load()
    with pytest.raises(PeerError, match="there is no peer 'ctranslate'; known are transformers, sentence-"):
        environments.selected(["ctranslate"])


def test_a_peer_in_its_own_process(peer: PeerProcess, source: Path) -> None:
    assert (peer.name, peer.weights) == ("transformers fp32", source)
    times = peer.generate(PROMPTS, 4)
    assert [len(row) for row in times] == [4, 4]
    assert all(0 < first < last < 60 for first, *_, last in times)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0].numpy()
    assert np.allclose(peer.logits(PROMPTS[1]), expected, atol=1e-5)


def test_what_a_library_refuses_is_a_sentence_and_it_goes_on(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="^IndexError: index out of range"):
        peer.logits([10**6])
    with pytest.raises(PeerError, match="^AttributeError: .* no attribute 'embed'"):
        peer.embed(["a"], 1)
    assert len(peer.generate(PROMPTS[:1], 2)[0]) == 2


def test_a_peer_that_can_not_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "python_of", lambda environment, cache: Path("/bin/false"))
    failed: dict[str, str] = {}
    own = Environment("own", generators=("transformers-fp32",))
    assert list(process.started([own], "generators", lambda name: tmp_path, tmp_path, tmp_path, failed)) == []
    assert failed == {"transformers-fp32": "its process ended with status 1"}


@pytest.mark.slow
def test_a_peer_that_can_not_be_installed(tmp_path: Path) -> None:
    failed: dict[str, str] = {}
    none = Environment("none", requirements=("trident-has-no-such-peer==1.0",), generators=("a", "b"))
    assert list(process.started([none], "generators", lambda name: tmp_path, tmp_path, tmp_path, failed)) == []
    assert failed["a"] == failed["b"]
    assert "No matching distribution found for trident-has-no-such-peer==1.0" in failed["a"]


def test_a_crash_is_a_line_in_the_table(peer: PeerProcess) -> None:
    """The last test of this peer."""
    os.kill(peer._process.pid, signal.SIGSEGV)
    with pytest.raises(PeerError, match="its process was ended by SIGSEGV"):
        peer.generate(PROMPTS, 2)
    with pytest.raises(PeerError, match="its process was ended by SIGSEGV"):
        peer.logits([1])

    def work() -> int:
        raise PeerError("its process was ended by SIGSEGV")

    failed: dict[str, str] = {}
    rates = bench.measure({"g | transformers pipeline": lambda: 1, "g | other": work}, 2, failed)
    assert failed == {"other": "its process was ended by SIGSEGV"}
    assert set(rates["g"]) == {"transformers pipeline"}
    assert "| | other | failed: its process was ended by SIGSEGV |" in bench.as_table(rates, {}, failed)


def test_the_table_of_generation() -> None:
    measured = {"decode": 50.0, "first_token": 9.0, "gap_p50": 1.0, "gap_p99": 2.0}
    streams = {str(number): measured for number in generation.CONCURRENCY}
    peer = {"kl": 0.01, "weights_bytes": 2**20, "prefill": 100.0, "bandwidth_share": 0.5, "streams": streams}
    table = generation.as_table(
        {
            "processor": "a processor, 2 cores, AVX2",
            "peers": {"transformers fp32": peer, "quick": peer | {"prefill": 250.0}},
            "failed": {"broken": "its process was ended by SIGSEGV"},
            "features": {},
            "first_token": {"smollm2": {"served": 9.0, "in process": 8.0}},
        }
    )
    assert "a processor, 2 cores, AVX2. Ratios in brackets are to transformers fp32." in table
    assert "| quick | 0.0100 | 1 | 50% | 250 (2.5) | 50 (1.00) |" in table
    assert "| broken | failed: its process was ended by SIGSEGV |" in table


def test_what_the_processor_has(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f amx_int8\n\n")
    assert processor.sentence(tmp_path / "cpuinfo") == f"Xeon, {os.cpu_count()} cores, AMX int8, AVX512, AVX2"
    assert processor.sentence(tmp_path / "none").endswith(f", {os.cpu_count()} cores")
