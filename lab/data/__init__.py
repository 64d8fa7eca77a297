"""What the lab draws: pictures of print with dense labels, all from seeds."""
