"""Conversations as prompts: what a request sends, the model's chat template, and whose each character is.

`messages` checks what a request sends, `template` renders it as transformers does, `environment` is what a template
may use, and `origins` keeps the template's own text apart from that of messages, documents and tools.
"""
