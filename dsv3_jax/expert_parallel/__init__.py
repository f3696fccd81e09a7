"""Who sends what to whom (`plan`), and the sending (`exchange`). Knows arrays and the mesh, no modules."""
