"""What a training run is made of: batches, samples, weights, random numbers, an optimizer, processes."""
