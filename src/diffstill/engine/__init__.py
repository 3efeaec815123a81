"""The engine: one loop for every method, exact resume, EMA, devices and processes."""
