"""From video files to training batches: clips, decoding, latent shards, batch order (s3.2.1). No model here."""
