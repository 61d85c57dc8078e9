"""What routers choose: watched, compared and replayed, and how warm it keeps the experts."""
