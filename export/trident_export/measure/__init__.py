"""What a variant gets wrong and what it costs.

fidelity        the measures against Hugging Face, and the gate
quality         `trident-export evaluate`: the measures, sizes and speeds of every variant
sensitivity     `trident-export sensitivity`: the loss of each layer by a recipe
"""
