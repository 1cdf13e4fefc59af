"""Configuration: the Hydra tree, its typed schema, the component registry and the user-facing
errors."""
