"""Files for others: an SAE and what is known of its features. It loads no torch and knows no SQL and no jobs."""
