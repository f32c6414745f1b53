"""Tokenizer stage of an ensemble: texts in, padded token ids out. See `trident_serving.encoding`."""

import triton_python_backend_utils as pb_utils

from trident_serving import encoding, text, triton_adapter


class TritonPythonModel:
    def initialize(self, args):
        triton_adapter.setup(pb_utils)
        config = triton_adapter.model_config(args)
        settings = encoding.EncodingSettings.from_parameters(triton_adapter.parameters(config))
        self.max_bytes = settings.max_bytes
        self.encoder = encoding.TextEncoder.load(triton_adapter.version_folder(args), settings)

    def execute(self, requests):
        return [triton_adapter.answer(pb_utils, self.encode, request) for request in requests]

    def encode(self, inputs):
        texts = text.decode_texts(inputs["text_input"], "text_input", self.max_bytes)
        truncate = inputs.get("truncate")
        input_ids, attention_mask = self.encoder.encode(
            texts, truncate=None if truncate is None else bool(truncate.any())
        )
        return {"input_ids": input_ids, "attention_mask": attention_mask}
