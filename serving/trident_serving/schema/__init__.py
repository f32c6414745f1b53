"""What a request may say and what a model's limits are, each declared once.

`fields` holds the fields of requests: config.pbtxt, the parsers, the client's options, the flags of `trident` and
docs/reference/requests.md come from them. `limits` holds the limits of models.toml, which the configs carry to the
server. `reading` turns tables and texts into dataclasses.
"""
