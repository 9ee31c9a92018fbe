"""Steering: what is changed in a language model, how it then writes, and what that did. It knows no jobs."""
