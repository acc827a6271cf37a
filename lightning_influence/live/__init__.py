"""A run while it trains: its steps followed for whoever records or selects, and a recorder for loops of one's own."""
