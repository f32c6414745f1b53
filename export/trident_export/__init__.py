"""From a Hugging Face model to checked ONNX artefacts in a Triton model repository.

models_file     models.toml -> specs
sources         a spec's source -> a Hugging Face folder
causal_graph, encoder_graph     a model -> an ONNX graph
shape_folding   shapes that never change -> constants
recipes         a graph -> its variants: fp32, int8, ...
fidelity        what a variant gets wrong, and the gate
configs         specs -> config.pbtxt
tasks           the parts above, put together for each task
install         build aside, check, move into place
pin             hub revisions
cli             `trident-export`
"""

import trident_serving  # noqa: F401  (turns ONNX Runtime's telemetry off, before anything here imports it)
