"""What a run will take before it is started: memory, time, the best layout. Plain numbers, no torch."""
