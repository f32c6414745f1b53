"""Triton's own tests (the folder qa of triton-inference-server/server), run against our launcher's server.

`python -m tests.upstream CHECKOUT` runs them. Nothing of that repository is here, and nothing is fetched.
"""
