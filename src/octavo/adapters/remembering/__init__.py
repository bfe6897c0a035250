"""What all who remember plans share: what a plan depends on, its form as JSON, and the folder that keeps it."""
