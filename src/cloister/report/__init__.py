"""What a command tells its reader: typed outputs, terminal tables, and the report page."""
