"""The rank grid of each role, its process groups, and the exchange of Python data between roles.

Knows nothing of models."""
