"""What a run writes for people: completion tables, learning curve, statistics of z, throughput, progress."""
