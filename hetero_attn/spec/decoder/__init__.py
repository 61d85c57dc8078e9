"""What every block of the decoder families declares, so that a model is planned without what computes it."""
