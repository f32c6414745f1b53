"""From logits to the next token, for both engines.

params      what a request asks for, checked
candidates  the tokens that may come next, with their scores
processors  what one field does to them: a class each
sampler     one sequence: its processors, then the likeliest token or one that is drawn
"""
