"""Feature losses."""
