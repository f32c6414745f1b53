"""From a Hugging Face model to checked ONNX artefacts in a Triton model repository.

models_file     models.toml -> specs
sources         a spec's source -> a Hugging Face folder
folder          what transformers reads of a Hugging Face folder
graphs          a model -> an ONNX graph
recipes         a graph -> its variants: fp32, int8, ...
measure         what a variant gets wrong and what it costs, and the gate
configs         specs -> config.pbtxt
tasks           the parts above, put together for each task
install         build aside, check, move into place
pin             hub revisions
errors          what can go wrong, by what its user should do
disk, memory    what an export needs, asked for before the heavy work
progress, quiet, report         lines, bars, and how a command ends
cli             `trident-export`
"""

import trident_serving as trident_serving  # switches ONNX Runtime's telemetry off before anything here imports it
