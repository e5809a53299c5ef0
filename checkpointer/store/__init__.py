"""The Postgres side: connections without a lock, LangGraph's own tables, and the statements on them."""
