"""Which words an answer rests on: `trident-export explain`, by the code that explains on a server.

models  the stages of an encoder in a repository, whose graph runs here or on a server
asking  from a model and texts to explanations
"""
