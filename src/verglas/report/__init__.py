"""See docs/walk.md."""
