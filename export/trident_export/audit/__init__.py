"""Whether a model treats people alike who differ in one word: `trident-export audit`.

groups.toml   the groups of each axis, and sentences with a place for them, written for this
cases         makes the texts
measuring     asks a server, and makes gaps with their intervals
guards        what a guard of models.toml finds in texts written for it: `trident-export audit-guard`
report        one audit, from the model to the tables
"""
