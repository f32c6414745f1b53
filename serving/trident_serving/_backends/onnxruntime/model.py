"""Stand-in for Triton's C++ ONNX Runtime backend, where the server has none: `trident_serving.triton.onnx_backend`."""

import triton_python_backend_utils as pb_utils

from trident_serving.triton import adapter, onnx_backend


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        config = auto_complete_model_config.as_dict()
        completion = onnx_backend.complete(adapter.folder_to_complete(), config)
        if completion is not None:
            auto_complete_model_config.set_max_batch_size(completion.max_batch_size)
            for tensor in completion.inputs:
                auto_complete_model_config.add_input(tensor)
            for tensor in completion.outputs:
                auto_complete_model_config.add_output(tensor)
            if completion.dynamic_batching:
                auto_complete_model_config.set_dynamic_batching()
        return auto_complete_model_config

    def initialize(self, args):
        self.process = adapter.setup(pb_utils, args)
        self.is_stage = adapter.is_stage(args)  # a request to a stage belongs to one that runs, so it is not new
        folder = adapter.version_folder(args)
        self.model = onnx_backend.OnnxModel(folder, adapter.model_config(args))
        self.process.start()

    def execute(self, requests):
        with self.process.answering(len(requests)):
            return self.answer(requests)

    def answer(self, requests):
        responses = [None] * len(requests)
        batch = []
        for index, request in enumerate(requests):
            try:
                if not self.is_stage:
                    adapter.check_admission(request, self.process)
                batch.append((index, self.model.prepare(adapter.inputs(request))))
            except Exception as error:
                responses[index] = adapter.response(pb_utils, error)
        for (index, _), result in zip(batch, self.model.run([feeds for _, feeds in batch])):
            responses[index] = adapter.response(pb_utils, result)
        return responses

    def finalize(self):
        self.process.stop()
