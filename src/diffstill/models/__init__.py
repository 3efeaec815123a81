"""Networks behind one wrapper (``Denoiser``), adapters for diffusers families, and how students are made."""
