"""Formats of shards, one per module."""
