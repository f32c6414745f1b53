"""The versions of a model repository: which one is served, and the way from one to another.

Nothing here exports, and nothing needs torch: these commands also run where the repository is only served.
"""
