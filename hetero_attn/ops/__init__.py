"""One operation over the lanes and the cache: a cut linear, attention in segments, the step's row tables."""
