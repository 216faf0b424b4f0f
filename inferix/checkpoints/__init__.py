"""Files to weights: checkpoints of every published container, and LoRAs."""
