"""From a model and a layer to the reconstruction graph: view, trace, bind, tail, plan, emit."""
