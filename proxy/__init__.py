"""A vsock-to-TCP splice proxy, and the address forms that the signer shares with it."""
