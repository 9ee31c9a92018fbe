"""The language that every door speaks: operations, records, events, errors, and the client. It imports no torch."""
