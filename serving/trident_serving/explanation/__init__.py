"""Which words an answer rests on: each is hidden from the model, and what the score loses is what it counts for.

units        a text as words, sentences or tokens
encoders     hides them, one after the other, from the graph that serves
scores       what is explained of the graph's outputs, for each task
generators   takes them from a prompt, and asks how probable the answer still is
asking       from texts and options to explanations
report       explanations as a table, JSON, and a page with marked text
service      answers requests for explanations by calls to the model that is explained
"""
