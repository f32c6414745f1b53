"""Encoder-decoder models: encode a text once, decode many beams together, search by beams.

request     tensors -> checked requests
source      text -> windows of source tokens; tokens -> text
rules       what a generation config forbids or forces
search      greedy, sampling and beam search for one text; no model
decoder     the two graphs and their caches
engine      the loop: admit, encode, decode, search
service     all of it for one model's artefacts
"""
