"""Continuous-batching text generation, on what `trident_serving.runtime` has.

request      tensors of a request -> a checked `GenerationRequest`
slots        which slot of the KV cache a sequence gets, and how much of its prompt is there already
scheduler    which sequence does what in the next step: no tensors, no I/O
batch        different numbers of tokens for several slots as one packed run
decoder      runs of the ONNX graph
drafting     tokens that may come next, found in the sequence itself
draft_model  or said by a smaller model
vision       how a model reads images; images and image_tower do it
answer       one answer while it is generated: its sampler, its drafts, its consumer
engine       a step: schedule, run, let every answer take its tokens
stopping     stop strings, held back until they can't match
stream       the text side of one request
text_service the text side of a model: requests, grammars, responses
service      all of these for one model folder
"""
