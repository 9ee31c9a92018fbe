"""Handlers of api/operations/settings.py."""

from __future__ import annotations
