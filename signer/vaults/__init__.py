"""Where keys are and signatures are made: the interface, and a package per kind of vault."""
