"""From a model and a layer to the reconstruction graph (docs/design.md has the walk)."""
