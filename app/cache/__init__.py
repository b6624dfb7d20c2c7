"""What was answered before: calls by idempotency key, and results that are kept."""
