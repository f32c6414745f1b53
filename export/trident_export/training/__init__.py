"""Training that makes a model for a task out of an encoder that has none."""
