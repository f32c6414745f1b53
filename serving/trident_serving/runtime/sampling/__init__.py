"""From logits to the next token, for both engines.

params      what a request asks for, checked
candidates  the tokens that may come next, with their scores
processors  what one field does to them: a class each
watermark   which tokens a watermark makes likelier, and how many of a text's are
sampler     one sequence: its processors, then the likeliest token or one that is drawn
"""
