"""Files that are written whole, locks, and room on the disk."""
