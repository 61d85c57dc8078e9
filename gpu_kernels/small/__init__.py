"""The ops between the products that few families have."""
