"""What the signer tells about itself: logs and metrics."""
