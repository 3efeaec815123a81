"""Pure diffusion mathematics: no I/O, no networks of our own, tables in float64."""
