"""Tenants, conversations that the server keeps, and limits: what outlives a request, and whose it is. Knows `core` alone."""
