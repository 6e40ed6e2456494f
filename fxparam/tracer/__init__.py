"""From a user's model to a live tree without parametrizations, and from there to graphs."""
