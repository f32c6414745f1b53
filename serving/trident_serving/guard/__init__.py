"""What is checked before and behind a generator: a guard of models.toml at work.

patterns   a regular expression as an automaton that takes a text in chunks
rules      guards and their rules, as tables and as a parameter of a generator's config
filtering  one text through all rules of a guard, chunk by chunk
structured JSON that a model writes, through the same rules
asking     what served models say of a text: entities, classes, a judge's verdict
prompts    the texts of a request, filtered in place
service    a generator's service with a guard around it
"""
