"""Continuous-batching text generation.

request      tensors of a request -> a checked `GenerationRequest`
scheduler    which sequence does what in the next step: no tensors, no I/O
kv_cache     the buffers that hold keys and values, one row a sequence
decoder      one run of the ONNX graph
sampling     logits -> token
engine       the loop: schedule, run, sample, hand out
detokenizer  tokens -> text that never breaks a character
stopping     stop strings, held back until they can't match
stream       the text side of one request
outbox       the thread that sends
service      all of these for one model folder
"""
