"""The production stack and its checks."""
