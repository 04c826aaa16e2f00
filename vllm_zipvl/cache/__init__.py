"""The KV cache: its spec, the scheduler's manager and the worker's page heap."""
