"""From a folder of videos to a manifest of clips worth training on (s3.2.1, App. B).

    videos --scoring, sharded--> scores/chunk-*.parquet --selection, seconds--> manifest.parquet + report.html

Scoring decodes and writes what was measured; selection reads it and compares with thresholds. So a threshold
can be changed without decoding anything again.
"""
