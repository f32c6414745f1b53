"""What both engines stand on, text generation and encoder-decoder models.

loop                an engine's thread: steps, cancelled and overdue requests, a new start after an error
kv_cache            the buffers that hold keys and values, one slot for each sequence
session             ONNX Runtime sessions, and what a run reads and writes
tokenizer           text to tokens; the chat template
detokenizer         tokens -> text that never breaks a character
sampling            logits -> token
log_probabilities   of the model's own distribution
outbox              the thread that sends
metrics             what an engine counts
memory              how much this process may still take
"""
