"""What will be needed, and when: a model of reuse that learns as it goes, the eviction policies, and a simulator of both."""
