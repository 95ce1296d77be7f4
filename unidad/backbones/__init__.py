"""Networks behind one interface, and how they are found on disk."""
