"""The way from Redis to Postgres: what is owed, the one transaction that pays it, and the thread that does so."""
