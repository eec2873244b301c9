"""Exact nearest rows: candidates in floating point, re-ranked in integers where these leave a tie open."""
