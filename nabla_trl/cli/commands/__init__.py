"""The commands of `nabla-trl`, one module each, with its options and its `main`."""
