"""Ways from latents to codes."""
