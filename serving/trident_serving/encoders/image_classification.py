"""Classes of an image, the likeliest first."""

from __future__ import annotations

from trident_serving.encoders import classification
from trident_serving.encoders.images import IMAGE, PARAMETERS, PIXELS, STAGE, read_images
from trident_serving.encoders.task import SCORE, TOP_K, EncoderTask, Tensor

TASK = EncoderTask(
    name="image-classification",
    stage=STAGE,
    texts=(IMAGE,),
    model_inputs=(PIXELS,),
    model_outputs=(Tensor("logits", "FP32", ("labels",)),),
    read=("logits",),
    answer_options=(TOP_K,),
    answers=(Tensor("label", "STRING", (-1,)), SCORE),
    parameters=PARAMETERS,
    answer_parameters={"labels": "labels"},
    preprocess=read_images,
    postprocess=classification.best_labels,
)
