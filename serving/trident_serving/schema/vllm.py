"""What a table `[model.vllm]` of models.toml says: arguments of vLLM's engine, by vLLM's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from trident_serving.schema.reading import JsonObject


@dataclass(frozen=True)
class VllmSettings:
    """Arguments of vLLM's engine; what is None, vLLM decides.

    Attributes:
        python: the interpreter of an environment with vLLM. The environment variable `TRIDENT_VLLM_PYTHON` goes before
            it; with neither, `python3` of the server's environment.
        tensor_parallel_size: devices that share every layer.
        pipeline_parallel_size: groups of devices that have some of the layers each.
        data_parallel_size: copies of the model that share the requests.
        enable_expert_parallel: experts of a mixture are on different devices.
        distributed_executor_backend: what runs the devices' processes: "mp" or "ray".
        gpu_memory_utilization: the share of a device's memory that vLLM takes.
        cpu_offload_gb: GiB of the weights that stay in the machine's memory.
        max_num_batched_tokens: tokens in one step at most, which is how much of a prompt runs at once.
        enable_chunked_prefill: whether long prompts run in parts.
        block_size: tokens in a block of the cache.
        kv_cache_dtype: numbers of the cache, such as "fp8".
        quantization: how vLLM quantizes the weights when it loads them, such as "fp8".
        load_format: how it reads them.
        model_impl: whose code computes: "vllm", "transformers" or "auto".
        attention_backend: by its name in vLLM.
        enforce_eager: nothing is compiled, so that a start takes less time.
        speculative_config: how answers are drafted.
        compilation_config: what is compiled.
        hf_overrides: keys that go over those of config.json.
    """

    python: str = ""
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    enable_expert_parallel: bool | None = None
    distributed_executor_backend: str | None = None
    gpu_memory_utilization: float | None = None
    cpu_offload_gb: float | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool | None = None
    block_size: int | None = None
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    load_format: str | None = None
    model_impl: str | None = None
    attention_backend: str | None = None
    enforce_eager: bool | None = None
    speculative_config: JsonObject | None = None
    compilation_config: JsonObject | None = None
    hf_overrides: JsonObject | None = None

    def arguments(self) -> dict[str, Any]:
        """Those that are given, as vLLM takes them."""
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "python"}
        return {
            name: value.values if isinstance(value, JsonObject) else value
            for name, value in given.items()
            if value is not None
        }

    def as_json(self) -> str:
        """What is given, as a parameter of a config carries it."""
        return json.dumps(({"python": self.python} if self.python else {}) | self.arguments(), ensure_ascii=False)
