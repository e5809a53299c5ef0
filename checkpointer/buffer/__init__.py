"""The Redis side: where records lie, the scripts, calls and replies without I/O, and the clients that run them."""
