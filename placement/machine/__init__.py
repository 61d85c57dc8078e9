"""What a machine gives: measured or catalogued rates, and the fingerprint of the machine they belong to."""
