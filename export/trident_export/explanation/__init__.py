"""Which words an answer rests on: `trident-export explain`.

units        a text as words, sentences or tokens
encoders     hides them, one after the other, from the graph that serves, here or on a server
scores       what is explained of the graph's outputs, for each task
generators   takes them from a prompt, and asks a server how probable the answer still is
asking       from a model and texts to explanations
report       explanations as a table, JSON, and a page with marked text
"""
