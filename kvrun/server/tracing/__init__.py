"""Where spans of requests go; one file per protocol, loaded when it is asked for."""
