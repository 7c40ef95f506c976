"""The latent space of a model: its VAE, its text encoders, its prompts."""
