"""Training by transformers' Trainer.

examples  what a head learns from
heads     a head for a task on an encoder that has none
run       checkpoints, progress, processes and DeepSpeed, of distillation too
"""
