"""Temporal autoencoder (Movie Gen s3.1.1): pixels to latents an eighth as long, high and wide, and back."""
