"""Handlers of api/operations/ablation.py."""

from __future__ import annotations
