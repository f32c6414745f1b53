"""From a model to a float32 ONNX graph, and the passes on that graph before any recipe.

causal, seq2seq     transformers' decoders and encoder-decoders, by tracing
tracing             one call of torch's exporter for all of them
encoder             encoders
image_inputs        a decoder's image tower, and the decoder's inputs for its vectors
patch_tower         an image tower that reads an image at its own size
rotary              rotary embeddings that the attention operator computes
shape_folding       shapes that never change become constants
decoder_passes      fewer and larger operators for decoders
read_rows           behind the last attention, only tokens whose logits are wanted
unpadding           encoders compute real tokens only
"""
