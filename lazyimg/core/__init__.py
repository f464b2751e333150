"""Decisions: plain values in, plain values out.  No trio, httpx, files or clock."""
