"""From a log and queries to scores."""
