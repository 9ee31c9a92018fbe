"""Language models and text: loading, hook points, tokens, datasets. No jobs, no HTTP, no SQL."""
