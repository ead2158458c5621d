"""Logit losses."""
