"""Models as other quantisers write them."""
