"""The HTTP front end: what is answered (`api`, `utility`), and how it is served (`app`, `server`)."""
