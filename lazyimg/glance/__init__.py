"""Glance over HTTP: one attempt per call, typed errors.  Owner of httpx and openstacksdk."""
