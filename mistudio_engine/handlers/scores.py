"""Handlers of api/operations/scores.py."""

from __future__ import annotations
