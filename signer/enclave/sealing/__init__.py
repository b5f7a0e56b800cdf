"""How keys are sealed so that the host can store them."""
