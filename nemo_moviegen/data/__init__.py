"""From video files to training batches: clips, decoding, latent shards, batch order. No model here."""
