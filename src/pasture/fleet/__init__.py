"""A cluster at work: Ray places and heals the processes, and these modules are what runs in them."""
