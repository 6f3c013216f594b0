"""More than one machine: which replica serves a request, and how replicas live and move their sessions."""
