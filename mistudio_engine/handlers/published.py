"""Handlers of api/operations/published.py."""

from __future__ import annotations
