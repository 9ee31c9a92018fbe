"""Handlers of api/operations/analysis.py."""

from __future__ import annotations
