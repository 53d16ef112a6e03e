"""From a model and a layer to the reconstruction graph.

In the order of the walk: view, trace (with symbolic, export, constants, functional, names), bind,
tail, plan, emit, prepare, inverse.
"""
