"""What each feature fires on and promotes, and how to find it."""
