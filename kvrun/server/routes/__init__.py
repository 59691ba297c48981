"""One file per group of routes; each has a `router`, and what needs no key in `open_router`."""
