"""Images without a model: the bytes of a file to pixels, and pixels to what a graph reads.

decoding        Pillow decodes, within limits
preprocessing   resizing, cropping and normalizing as transformers' image processors do it
tiles           cutting an image into tiles of one size, for models that also read text
patches         cutting an image into patches at its own size, for other such models
"""
